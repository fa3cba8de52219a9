// Node: @grpc/grpc-js with messages that @grpc/proto-loader reads from proto/ at run time.

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const PROTO = fileURLToPath(new URL("../../../proto", import.meta.url));
const LIMIT_MS = 30_000;
const UNKNOWN = "Request for unknown model: 'nope' is not found";
const LEFT = Array.from({ length: 16 }, (_, i) => i);
const RIGHT = Array(16).fill(3);
const SUM = LEFT.map((left, i) => left + RIGHT[i]);
const DIFFERENCE = LEFT.map((left, i) => left - RIGHT[i]);

const definition = loader.loadSync(["grpc_service.proto", "health.proto"], {
  includeDirs: [PROTO],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { inference, grpc: standard } = grpc.loadPackageDefinition(definition);
const credentials = grpc.credentials.createInsecure();
const server = new inference.GRPCInferenceService(process.env.SERVER_GRPC, credentials);
const health = new standard.health.v1.Health(process.env.SERVER_GRPC, credentials);
after(() => {
  server.close();
  health.close();
});

// One unary call: resolves to the answer, rejects with grpc-js's ServiceError.
function call(client, method, message, limitMs = LIMIT_MS) {
  return new Promise((resolve, reject) => {
    client[method](message, { deadline: Date.now() + limitMs }, settle(resolve, reject));
  });
}

function settle(resolve, reject) {
  return (error, answer) => (error ? reject(error) : resolve(answer));
}

function refuses(promise, code, details) {
  return assert.rejects(promise, (error) => {
    assert.equal(grpc.status[error.code], code);
    if (details instanceof RegExp) assert.match(error.details, details);
    else assert.equal(error.details, details);
    return true;
  });
}

function tensor(name, datatype, shape, contents) {
  return contents === undefined ? { name, datatype, shape } : { name, datatype, shape, contents };
}

function typed(options = {}) {
  const inputs = [
    tensor("INPUT0", "INT32", [1, 16], { int_contents: LEFT }),
    tensor("INPUT1", "INT32", [1, 16], { int_contents: RIGHT }),
  ];
  return { model_name: "simple", inputs, ...options };
}

function raw(options = {}) {
  const inputs = [tensor("INPUT0", "INT32", [1, 16]), tensor("INPUT1", "INT32", [1, 16])];
  return { model_name: "simple", inputs, raw_input_contents: [LEFT, RIGHT].map(pack), ...options };
}

function pack(numbers) {
  const bytes = Buffer.alloc(4 * numbers.length);
  numbers.forEach((number, i) => bytes.writeInt32LE(number, 4 * i));
  return bytes;
}

function unpack(bytes) {
  return Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readInt32LE(4 * i));
}

async function serves(t, model) {
  try {
    await call(server, "ModelReady", { name: model });
    return true;
  } catch (error) {
    if (error.code !== grpc.status.NOT_FOUND) throw error;
    t.skip(`this server has no model '${model}'`);
    return false;
  }
}

test("the server lives and is ready", async () => {
  assert.deepEqual(await call(server, "ServerLive", {}), { live: true });
  assert.deepEqual(await call(server, "ServerReady", {}), { ready: true });
});

test("a model is ready, an unknown one is not found", async (t) => {
  await refuses(call(server, "ModelReady", { name: "nope" }), "NOT_FOUND", UNKNOWN);
  if (!(await serves(t, "simple"))) return;
  assert.deepEqual(await call(server, "ModelReady", { name: "simple", version: "1" }), { ready: true });
});

test("server metadata has a name, a version and extensions", async () => {
  const answer = await call(server, "ServerMetadata", {});
  assert.ok(answer.name);
  assert.match(answer.version, /^\d+\.\d+/);
  assert.ok(answer.extensions.includes("binary_tensor_data"), answer.extensions);
});

test("model metadata describes every tensor", async (t) => {
  if (!(await serves(t, "simple"))) return;
  const answer = await call(server, "ModelMetadata", { name: "simple" });
  assert.deepEqual([answer.name, answer.versions, answer.platform], ["simple", ["1"], "onnxruntime_onnx"]);
  const described = [...answer.inputs, ...answer.outputs].map(({ name, datatype, shape }) => [name, datatype, shape]);
  assert.deepEqual(
    described,
    ["INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1"].map((name) => [name, "INT32", ["-1", "16"]]),
  );
});

test("a configuration is read from the imported file", async (t) => {
  if (!(await serves(t, "simple"))) return;
  const { config } = await call(server, "ModelConfig", { name: "simple" });
  assert.deepEqual([config.name, config.max_batch_size, config.input[1].data_type], ["simple", 8, "TYPE_INT32"]);
});

for (const [form, request] of [["typed", typed], ["raw", raw]]) {
  test(`${form} contents are summed`, async (t) => {
    if (!(await serves(t, "simple"))) return;
    const answer = await call(server, "ModelInfer", request({ id: "nr. 7" }));
    assert.deepEqual([answer.model_name, answer.model_version, answer.id], ["simple", "1", "nr. 7"]);
    assert.deepEqual(
      answer.outputs.map(({ name, datatype, shape }) => [name, datatype, shape]),
      [["OUTPUT0", "INT32", ["1", "16"]], ["OUTPUT1", "INT32", ["1", "16"]]],
    );
    assert.deepEqual(answer.raw_output_contents.map(unpack), [SUM, DIFFERENCE]);
  });
}

test("only the outputs asked for come back", async (t) => {
  if (!(await serves(t, "simple"))) return;
  const answer = await call(server, "ModelInfer", raw({ outputs: [{ name: "OUTPUT1" }] }));
  assert.deepEqual(answer.outputs.map(({ name }) => name), ["OUTPUT1"]);
  assert.deepEqual(answer.raw_output_contents.map(unpack), [DIFFERENCE]);
});

test("classification gives index and value of the greatest", async (t) => {
  if (!(await serves(t, "simple"))) return;
  const outputs = [{ name: "OUTPUT0", parameters: { classification: { int64_param: 2 } } }];
  const answer = await call(server, "ModelInfer", raw({ outputs }));
  assert.deepEqual([answer.outputs[0].datatype, answer.outputs[0].shape], ["BYTES", ["1", "2"]]);
  assert.deepEqual(answer.raw_output_contents.map(String), ["\x05\0\0\x0018:15\x05\0\0\x0017:14"]);
});

test("64-bit integers and floats keep their values", async (t) => {
  if (!(await serves(t, "identity_int64")) || !(await serves(t, "identity_fp64"))) return;
  const whole = ["-9223372036854775808", "9223372036854775807"];
  let inputs = [tensor("INPUT0", "INT64", [1, 2], { int64_contents: whole })];
  let answer = await call(server, "ModelInfer", { model_name: "identity_int64", inputs });
  assert.deepEqual([0, 8].map((at) => String(answer.raw_output_contents[0].readBigInt64LE(at))), whole);
  inputs = [tensor("INPUT0", "FP64", [1, 2], { fp64_contents: [0.1, -Infinity] })];
  answer = await call(server, "ModelInfer", { model_name: "identity_fp64", inputs });
  assert.deepEqual([0, 8].map((at) => answer.raw_output_contents[0].readDoubleLE(at)), [0.1, -Infinity]);
});

test("texts come back packed", async (t) => {
  if (!(await serves(t, "identity_bytes"))) return;
  const texts = ["wasser", "wässer", ""].map((text) => Buffer.from(text));
  const inputs = [tensor("INPUT0", "BYTES", [1, 3], { bytes_contents: texts })];
  const answer = await call(server, "ModelInfer", { model_name: "identity_bytes", inputs });
  const lengths = texts.map((text) => pack([text.length]));
  assert.deepEqual(answer.raw_output_contents, [Buffer.concat(texts.flatMap((text, i) => [lengths[i], text]))]);
});

test("a message of many megabytes comes back whole", async (t) => {
  if (!(await serves(t, "identity_fp32"))) return;
  const floats = new Float32Array(4 << 20).map((_, i) => i);
  const unlimited = { "grpc.max_receive_message_length": -1 };
  const client = new inference.GRPCInferenceService(process.env.SERVER_GRPC, credentials, unlimited);
  const answer = await call(client, "ModelInfer", {
    model_name: "identity_fp32",
    inputs: [tensor("INPUT0", "FP32", [1, floats.length])],
    raw_input_contents: [Buffer.from(floats.buffer)],
  }).finally(() => client.close());
  assert.ok(answer.raw_output_contents[0].equals(Buffer.from(floats.buffer)));
});

test("many calls at once each get their own answer", async (t) => {
  if (!(await serves(t, "simple"))) return;
  const ids = Array.from({ length: 200 }, (_, i) => i);
  const answers = await Promise.all(
    ids.map((id) => {
      const contents = [LEFT, Array(16).fill(id)].map(pack);
      return call(server, "ModelInfer", raw({ id: String(id), raw_input_contents: contents }));
    }),
  );
  for (const id of ids) {
    assert.equal(answers[id].id, String(id));
    assert.deepEqual(unpack(answers[id].raw_output_contents[0]), LEFT.map((left) => left + id));
  }
});

test("a stream answers each message and ends", async (t) => {
  if (!(await serves(t, "simple"))) return;
  const stream = server.ModelStreamInfer({ deadline: Date.now() + LIMIT_MS });
  stream.write(typed({ id: "a" }));
  stream.write(raw({ id: "b", model_name: "nope" }));
  stream.end(raw({ id: "c" }));
  const answers = {};
  const errors = [];
  try {
    for await (const { error_message, infer_response } of stream) {
      if (error_message) errors.push(error_message);
      else answers[infer_response.id] = infer_response.raw_output_contents.map(unpack);
    }
  } catch (error) {
    if (error.code !== grpc.status.UNIMPLEMENTED) throw error;
    t.skip("this server has no ModelStreamInfer");
    return;
  }
  assert.deepEqual(answers, { a: [SUM, DIFFERENCE], c: [SUM, DIFFERENCE] });
  assert.deepEqual(errors, [UNKNOWN]);
});

test("refusals carry code and text", async (t) => {
  await refuses(call(server, "ModelMetadata", { name: "nope" }), "NOT_FOUND", UNKNOWN);
  await refuses(call(server, "ModelInfer", raw({ model_name: "nope" })), "NOT_FOUND", UNKNOWN);
  if (!(await serves(t, "simple"))) return;
  const short = raw({ id: "a", raw_input_contents: [pack(LEFT), pack(RIGHT.slice(1))] });
  await refuses(
    call(server, "ModelInfer", short),
    "INVALID_ARGUMENT",
    "[request id: a] input byte size mismatch for input 'INPUT1' for model 'simple'. Expected 64, got 60",
  );
  const both = { ...typed(), raw_input_contents: [LEFT, RIGHT].map(pack) };
  await refuses(
    call(server, "ModelInfer", both),
    "INVALID_ARGUMENT",
    "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'",
  );
});

test("values that a model cannot take are told with the runtime's words", async (t) => {
  if (!(await serves(t, "failing"))) return;
  const inputs = [tensor("INPUT0", "INT64", [1], { int64_contents: ["9"] })];
  const asked = call(server, "ModelInfer", { model_name: "failing", inputs });
  await refuses(asked, "INVALID_ARGUMENT", /indices element out of data bounds, idx=9/);
});

test("an unknown method is UNIMPLEMENTED", async () => {
  const path = "/inference.GRPCInferenceService/Nope";
  const asked = new Promise((resolve, reject) => {
    const bytes = (value) => value;
    server.makeUnaryRequest(path, bytes, bytes, Buffer.alloc(0), settle(resolve, reject));
  });
  await refuses(asked, "UNIMPLEMENTED", /./);
});

test("health Check knows the server, the service and every model", async (t) => {
  for (const service of ["", "inference.GRPCInferenceService"]) {
    assert.deepEqual(await call(health, "Check", { service }), { status: "SERVING" });
  }
  await refuses(call(health, "Check", { service: "nope" }), "NOT_FOUND", /./);
  if (!(await serves(t, "simple"))) return;
  assert.deepEqual(await call(health, "Check", { service: "simple" }), { status: "SERVING" });
});

for (const [service, status] of [["", "SERVING"], ["nope", "SERVICE_UNKNOWN"]]) {
  test(`health Watch of '${service}' begins with ${status} and ends when cancelled`, async () => {
    const watch = health.Watch({ service }, { deadline: Date.now() + LIMIT_MS });
    const first = await new Promise((resolve, reject) => watch.once("data", resolve).once("error", reject));
    assert.deepEqual(first, { status });
    const ended = new Promise((resolve) => watch.once("error", resolve));
    watch.cancel();
    assert.equal((await ended).code, grpc.status.CANCELLED);
  });
}

function slow(steps) {
  const inputs = [
    tensor("INPUT0", "FP32", [1, 1], { fp32_contents: [1.5] }),
    tensor("STEPS", "INT64", [1], { int64_contents: [steps] }),
  ];
  return { model_name: "slow_loop", inputs };
}

test("a deadline that passes ends the call", async (t) => {
  if (!(await serves(t, "slow_loop"))) return;
  await refuses(call(server, "ModelInfer", slow(300), 50), "DEADLINE_EXCEEDED", /./);
  assert.deepEqual(await call(server, "ServerReady", {}), { ready: true });
});

test("a call that is cancelled ends, and the next one is served", async (t) => {
  if (!(await serves(t, "slow_loop"))) return;
  const cancelled = new Promise((resolve, reject) => {
    server.ModelInfer(slow(100), settle(resolve, reject)).cancel();
  });
  await refuses(cancelled, "CANCELLED", /./);
  const answer = await call(server, "ModelInfer", slow(1));
  assert.equal(answer.raw_output_contents[0].readFloatLE(0), 1.5);
});
