"""Does a vLLM still have every name that the plug-in uses? Read from sources; nothing is imported.

    python tests/serving/drift.py TREE [TREE ...]        (wheels, or folders with `vllm/`)
    make drift                                           (of the newest release, which it fetches)

- What is imported: each name has to be defined or imported in its module. Imports within
  `try: ... except ImportError` may be missing, and are listed.
- What is used of classes without being imported: `USED`, an attribute, field or argument of each.
- What we override: our arguments have to be those of the method that is overridden, by name.

Of several trees the signatures that differ from the first one's are listed as well.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

PLUGIN = Path(__file__).resolve().parents[2] / "liquidgemm" / "integrations" / "vllm"

_LAYERS = "vllm.model_executor.layers"
_LLAMA = "vllm.model_executor.models.llama"
_MOE = f"{_LAYERS}.fused_moe.config"
# Attributes, fields and methods by module and class.
USED = {
    (f"{_LAYERS}.linear", "RowParallelLinear"): (
        "tp_rank reduce_results skip_bias_add bias input_size_per_partition quant_method"
    ),
    (f"{_LAYERS}.linear", "LinearBase"): "input_size output_size",
    (f"{_LAYERS}.linear", "LinearMethodBase"): "create_weights apply",
    (f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding"): (
        "num_embeddings embedding_dim"
    ),
    (f"{_LAYERS}.quantization.base_config", "QuantizeMethodBase"): "process_weights_after_loading",
    (f"{_LAYERS}.quantization.base_config", "QuantizationConfig"): (
        "get_name get_supported_act_dtypes get_min_capability get_config_filenames from_config "
        "override_quantization_method maybe_update_config apply_vllm_mapper get_quant_method "
        "packed_modules_mapping"
    ),
    (f"{_LAYERS}.fused_moe.fused_moe_method_base", "FusedMoEMethodBase"): (
        "create_weights get_fused_moe_quant_config apply moe"
    ),
    (_MOE, "FusedMoEConfig"): (
        "num_experts moe_parallel_config tp_size tp_rank has_bias experts_per_token"
    ),
    (_MOE, "FusedMoEParallelConfig"): "tp_size ep_size use_all2all_kernels",
    ("vllm.model_executor.parameter", "BasevLLMParameter"): (
        "_assert_and_load _shard_id_as_int tp_rank tp_size"
    ),
    ("vllm.model_executor.parameter", "_ColumnvLLMParameter"): (
        "load_column_parallel_weight load_merged_column_weight load_qkv_weight"
    ),
    ("vllm.model_executor.parameter", "RowvLLMParameter"): "load_row_parallel_weight",
    ("vllm.config.vllm", "VllmConfig"): (
        "additional_config lora_config load_config compilation_config parallel_config"
    ),
    ("vllm.config.compilation", "CompilationConfig"): "mode",
    (f"{_LAYERS}.layernorm", "RMSNorm"): (
        "weight has_weight variance_epsilon variance_size_override"
    ),
    # Where norms and activations are found that quantize for layers of ours.
    (_LLAMA, "LlamaDecoderLayer"): "input_layernorm post_attention_layernorm self_attn mlp",
    (_LLAMA, "LlamaAttention"): "qkv_proj",
    (_LLAMA, "LlamaMLP"): "gate_up_proj act_fn down_proj",
    ("vllm.distributed.parallel_state", "GroupCoordinator"): "device_group device_communicator",
    ("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator"): "all_reduce disabled",
    ("vllm.distributed.device_communicators.cuda_communicator", "CudaCommunicator"): "pynccl_comm",
}
# Text of ours that has to be in a module as it is: a mark that vLLM deletes as it reloads a layer.
MARKS = {
    "vllm.model_executor.model_loader.reload.layerwise": (
        "_already_called_process_weights_after_loading"
    )
}

# Arguments that we give by name.
GIVEN = {"PyNcclCommunicator.all_reduce": "op"}


@dataclass
class Report:
    """What is missing, what may be, and the signatures that were found."""

    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)


class Tree:
    """The sources of a vLLM, a folder or a wheel."""

    def __init__(self, root: Path) -> None:
        self.root = zipfile.Path(root) if root.suffix == ".whl" else root
        self._modules: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            path = name.replace(".", "/")
            files = (self.root / f"{path}.py", self.root / f"{path}/__init__.py")
            found = next((file for file in files if file.exists()), None)
            self._modules[name] = None if found is None else ast.parse(found.read_text())
        return self._modules[name]

    def has(self, module: str, name: str) -> bool:
        """Whether it is defined, assigned or imported there, or is a module of its own."""
        tree = self.module(module)
        if tree is None:
            return False
        names = {name for node in ast.walk(tree) for name in bound(node)}
        return name in names or self.module(f"{module}.{name}") is not None

    def class_of(self, module: str, name: str) -> ast.ClassDef | None:
        tree = self.module(module)
        nodes = [] if tree is None else ast.walk(tree)
        return next((n for n in nodes if isinstance(n, ast.ClassDef) and n.name == name), None)

    def members(self, module: str, node: ast.ClassDef) -> dict[str, ast.AST]:
        """Of the class and of those of its module that it derives from."""
        found: dict[str, ast.AST] = {}
        for base in node.bases:
            if isinstance(base, ast.Name) and (own := self.class_of(module, base.id)) is not None:
                found |= self.members(module, own)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                found.setdefault(inner.attr, inner)
        for inner in node.body:
            for part in [inner] if isinstance(inner, ast.FunctionDef) else ast.walk(inner):
                found |= dict.fromkeys(bound(part), part)
        return found


def bound(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return []


def imports(source: ast.AST, optional: bool = False) -> list[tuple[str, str, bool]]:
    """Module and name of each import from vLLM, and whether it may be missing."""
    found = []
    for node in ast.iter_child_nodes(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found += [(node.module or "", alias.name, optional) for alias in node.names]
        guarded = isinstance(node, ast.Try) and any(
            isinstance(handler.type, ast.Name) and handler.type.id == "ImportError"
            for handler in node.handlers
        )
        found += imports(node, optional or guarded)
    return found


def signature(node: ast.AST) -> str | None:
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [f"*{a.arg}" for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return ", ".join(names)


def check(tree: Tree, plugin: Path = PLUGIN) -> Report:
    report = Report()
    for file in sorted(plugin.glob("*.py")):
        for module, name, optional in imports(ast.parse(file.read_text())):
            if not tree.has(module, name):
                (report.absent if optional else report.missing).append(f"{module}.{name}")
    for (module, name), used in USED.items():
        node = tree.class_of(module, name)
        if node is None:
            report.missing.append(f"{module}.{name}")
            continue
        members = tree.members(module, node)
        for member in used.split():
            if member not in members:
                report.missing.append(f"{module}.{name}.{member}")
            elif (found := signature(members[member])) is not None:
                report.signatures[f"{name}.{member}"] = found
    for name, argument in GIVEN.items():
        if argument not in report.signatures.get(name, "").split(", "):
            report.missing.append(f"{name}({argument})")
    for module, mark in MARKS.items():
        source = "" if (found := tree.module(module)) is None else ast.dump(found)
        if mark not in source:
            report.missing.append(f"{module}: {mark}")
    report.missing += overrides(report, plugin)
    return report


def overrides(report: Report, plugin: Path) -> list[str]:
    """Methods of ours that lack an argument which vLLM's have, and could be called with."""
    found = []
    for file in sorted(plugin.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = "FusedMoEMethodBase" if "Experts" in node.name else "LinearMethodBase"
            if node.name == "LiquidGemmConfig":
                bases = "QuantizationConfig"
            for method in node.body:
                ours = signature(method)
                theirs = report.signatures.get(f"{bases}.{getattr(method, 'name', '')}")
                if ours is None or theirs is None or "*kwargs" in ours:
                    continue
                own = set(ours.split(", "))
                lacking = [a for a in theirs.split(", ") if a not in own and a[0] != "*"]
                if lacking:
                    name = f"{node.name}.{getattr(method, 'name', '')}"
                    found.append(f"{file.name}: {name} lacks {', '.join(lacking)} of vLLM's")
    return found


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    first: dict[str, str] = {}
    status = 0
    for word in words:
        report = check(Tree(Path(word)))
        version = [info.stem for info in Path(word).glob("vllm*.dist-info")] or [Path(word).name]
        print(f"{version[0]}: {len(report.missing)} names missing")
        for name in report.missing:
            print(f"  missing: {name}")
        for name in report.absent:
            print(f"  not there, and not needed: {name}")
        for name, found in report.signatures.items():
            if first.get(name, found) != found:
                print(f"  {name}({found}), and before ({first[name]})")
        first = first or report.signatures
        status |= bool(report.missing)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
