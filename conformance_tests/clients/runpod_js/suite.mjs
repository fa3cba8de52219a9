// RunPod's JavaScript SDK: its base URL is another, and nothing else.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import runpodSdk from "runpod-sdk";

const SERVER = process.env.SERVER_URL;
const LIMIT_MS = 60_000;
const LONG = { input: { seconds: 60 } };
const runpod = runpodSdk("a-key", { baseUrl: `${SERVER}/v2` });

// The endpoint by this name; the test is skipped if the server lacks it. The one that run.py starts has them all.
async function endpoint(t, name) {
  if (!(await fetch(`${SERVER}/v2/models/${name}/ready`)).ok) t.skip(`this server has no model '${name}'`);
  else return runpod.endpoint(name);
}

async function until(found, what) {
  for (const end = Date.now() + LIMIT_MS; Date.now() < end; await sleep(50)) {
    if (await found()) return;
  }
  assert.fail(`${what}: not within ${LIMIT_MS} ms`);
}

const runs = (at, id) => until(async () => (await at.status(id)).status !== "IN_QUEUE", "the job is picked up");
const ends = (at, id) => until(async () => (await at.status(id)).completed, "the job ends");

test("run, status and statusSync", async (t) => {
  const echo = await endpoint(t, "job_echo");
  if (!echo) return;
  const accepted = await echo.run({ input: { text: "wässer" } });
  assert.deepEqual(Object.keys(accepted).sort(), ["id", "status"]);
  assert.equal(accepted.status, "IN_QUEUE");
  const job = await echo.statusSync(accepted.id);
  assert.deepEqual(job.output, { text: "wässer" });
  assert.equal(job.succeeded, true);
  const again = await echo.status(accepted.id);
  assert.deepEqual(again, job);
  for (const ms of [again.delayTime, again.executionTime]) assert.ok(Number.isInteger(ms));
});

test("runSync gives the output", async (t) => {
  const echo = await endpoint(t, "job_echo");
  if (!echo) return;
  const job = await echo.runSync({ input: { text: "a" } });
  assert.deepEqual([job.completed, job.succeeded, job.output], [true, true, { text: "a" }]);
});

test("runSync of a model with a signature", async (t) => {
  const simple = await endpoint(t, "simple");
  if (!simple) return;
  const left = Array.from({ length: 16 }, (_, i) => i);
  const job = await simple.runSync({ input: { INPUT0: [left], INPUT1: [Array(16).fill(1)] } });
  assert.deepEqual(job.output.OUTPUT0, [left.map((number) => number + 1)]);
});

test("runSync goes on with statusSync, which holds, and ends with its timeout", async (t) => {
  const waits = await endpoint(t, "job_async");
  if (!waits) return;
  const started = Date.now();
  const late = await waits.runSync(LONG, 1500);
  assert.deepEqual([late.completed, late.status], [false, "IN_PROGRESS"]);
  assert.ok(Date.now() - started >= 1500);
  assert.equal((await waits.cancel(late.id)).status, "CANCELLED");
  const job = await waits.runSync({ input: { seconds: 2 } }, 10_000);
  assert.deepEqual([job.completed, job.output], [true, { seconds: 2 }]);
});

test("a failed job is completed and has not succeeded", async (t) => {
  const failing = await endpoint(t, "job_failing");
  if (!failing) return;
  const job = await failing.runSync({ input: { how: "raise" } });
  assert.deepEqual([job.status, job.completed, job.succeeded], ["FAILED", true, false]);
  assert.match(job.error, /no water/);
});

test("stream gives every chunk once and ends", async (t) => {
  const counts = await endpoint(t, "job_stream");
  if (!counts) return;
  for (const seconds of [0, 0.05]) {
    const { id } = await counts.run({ input: { count: 25, seconds } });
    const got = [];
    for await (const chunk of counts.stream(id)) got.push(chunk);
    assert.deepEqual(got, Array.from({ length: 25 }, (_, output) => ({ output })));
  }
});

test("a stream of a job that takes its time is held instead of polled", async (t) => {
  const waits = await endpoint(t, "job_async");
  if (!waits) return;
  const { id } = await waits.run({ input: { seconds: 2 } });
  const got = [];
  for await (const chunk of waits.stream(id)) got.push(chunk);
  assert.deepEqual(got, []);
  assert.equal((await waits.status(id)).status, "COMPLETED");
});

test("cancel ends a running job", async (t) => {
  const slow = await endpoint(t, "job_slow");
  if (!slow) return;
  const { id } = await slow.run(LONG);
  await runs(slow, id);
  assert.equal((await slow.cancel(id)).status, "CANCELLED");
  const job = await slow.status(id);
  assert.deepEqual([job.status, job.completed, job.succeeded], ["CANCELLED", true, false]);
});

test("purgeQueue removes what waits, and health counts", async (t) => {
  const slow = await endpoint(t, "job_slow");
  if (!slow) return;
  const running = await slow.run(LONG);
  await runs(slow, running.id);
  await slow.run(LONG);
  await slow.run(LONG);
  const health = await slow.health();
  assert.deepEqual([health.jobs.inProgress, health.jobs.inQueue], [1, 2]);
  for (const name of ["idle", "running", "initializing", "ready", "throttled"]) {
    assert.ok(Number.isInteger(health.workers[name]), name);
  }
  assert.deepEqual(await slow.purgeQueue(), { removed: 2, status: "completed" });
  await slow.cancel(running.id);
});

test("a policy times a job out", async (t) => {
  const slow = await endpoint(t, "job_slow");
  if (!slow) return;
  const { id } = await slow.run({ ...LONG, policy: { executionTimeout: 5000 } });
  await ends(slow, id);
  assert.equal((await slow.status(id)).status, "TIMED_OUT");
});

test("refusals reject with their status", async (t) => {
  const echo = await endpoint(t, "job_echo");
  if (!echo) return;
  const refusals = [
    [() => runpod.endpoint("nope").run({ input: {} }), 404],
    [() => echo.run({}), 400],
    [() => echo.status("nope"), 404],
  ];
  for (const [asked, status] of refusals) {
    await assert.rejects(asked, (error) => {
      assert.equal(error.response.status, status);
      assert.equal(typeof error.response.data.error, "string");
      return true;
    });
  }
});
