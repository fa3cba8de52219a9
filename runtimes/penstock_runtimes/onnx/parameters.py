"""The parameters of a model that this runtime reads, and their values' forms."""

from collections.abc import Mapping

from msgspec import Struct
from penstock import pb
from penstock.errors import Kind, ServingError

# Triton's names, in a model's `parameters` or as defaults in `--backend-config onnxruntime,KEY=VALUE`.
SESSION = (
    "execution_mode",
    "intra_op_thread_count",
    "inter_op_thread_count",
    "enable_mem_arena",
    "enable_mem_pattern",
    "memory.enable_memory_arena_shrinkage",
    "session.use_device_allocator_for_initializers",
)
CUDA = (
    "cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream", "use_tf32",
    "cudnn_conv_use_max_workspace", "cuda_graph",
)  # fmt: skip

# No names of Triton's.
BINDING = ("io_binding", "cuda_graph_batch_sizes", "arena_shrink_idle_ms")

_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


class Parameters(Struct, frozen=True):
    """Texts by name, typed when they are read. `owner` is who a complaint names, such as `model 'simple'`."""

    owner: str
    values: Mapping[str, str]

    @classmethod
    def of(cls, config: pb.ModelConfig, defaults: Mapping[str, str] | None = None) -> "Parameters":
        """Those of a model, over `defaults`."""
        own = {key: parameter.string_value for key, parameter in config.parameters.items()}
        return cls(f"model '{config.name}'", {**(defaults or {}), **own})

    def text(self, key: str, default: str = "") -> str:
        return self.values.get(key, default)

    def integer(self, key: str) -> int | None:
        """None where it is absent. Raises ServingError(INVALID) for anything but a whole number."""
        if key not in self.values:
            return None
        try:
            return int(self.values[key])
        except ValueError:
            raise self.refusal(key, "a whole number") from None

    def boolean(self, key: str) -> bool | None:
        """None where it is absent. Raises ServingError(INVALID) for anything but 0, 1, true and false, in any case."""
        if key not in self.values:
            return None
        try:
            return _BOOLEANS[self.values[key].lower()]
        except KeyError:
            raise self.refusal(key, "0, 1, true or false") from None

    def refusal(self, key: str, expected: str) -> ServingError:
        return ServingError(
            Kind.INVALID, f"{self.owner}: parameter '{key}' expects {expected}, got '{self.values[key]}'"
        )
