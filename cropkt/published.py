"""Reads the checkpoints of the published CROPKT code, as modules for one bag.

    expert = load_expert("abmil.pth")         # expert(bag) -> hazard logits (T,)
    router = load_router("roupkt.pth", top_k=5)

A checkpoint is `{"model": state dict, "epoch": int}` or the state dict itself, read without
unpickling code. Widths are taken from the tensors; a missing, unknown or misshapen tensor is
refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from cropkt.config import PUBLISHED, ExpertShape
from cropkt.errors import ArtifactError
from cropkt.experts.abmil import Abmil
from cropkt.experts.single import SlideExpert, one_bag
from cropkt.transfer.roupkt import Roupkt, RouterOutput

_ATTENTION = {
    "feat_proj.0.weight": "project",
    "feat_proj.0.bias": "project_bias",
    "attention_net.attention_a.0.weight": "gate_tanh",
    "attention_net.attention_a.0.bias": "gate_tanh_bias",
    "attention_net.attention_b.0.weight": "gate_sigmoid",
    "attention_net.attention_b.0.bias": "gate_sigmoid_bias",
    "attention_net.attention_c.weight": "score",
    "attention_net.attention_c.bias": "score_bias",
    "pred_head.weight": "head",
    "pred_head.bias": "head_bias",
}
"""Published name to the name in `Abmil` and `Roupkt`."""


class PublishedRouter(nn.Module):
    """One published router; `roupkt` is the same as a stack of one."""

    def __init__(self, roupkt: Roupkt, *, top_k: int) -> None:
        super().__init__()
        self.roupkt = roupkt
        self.config = replace(PUBLISHED.router, top_k=top_k)

    def outputs(self, bag: Tensor, expert_features: Tensor) -> RouterOutput:
        """Return all that the router says of one bag (N, D) and features (X, E)."""
        return self.roupkt.outputs(
            one_bag(bag, self.roupkt.dim), expert_features[None, :, None], self.config
        )

    def forward(self, bag: Tensor, expert_features: Tensor) -> Tensor:
        """Return hazard logits (T,) of a bag (N, D) and its experts' slide features (X, E)."""
        return self.outputs(bag, expert_features).logits[0, 0]

    def router_logits(self, bag: Tensor) -> Tensor:
        """Return the router's logit of each expert, (X,), for a bag (N, D)."""
        seen, _ = self.roupkt(one_bag(bag, self.roupkt.dim))
        logits: Tensor = (seen @ self.roupkt.gate.transpose(1, 2))[0, 0]
        return logits

    def gates(self, bag: Tensor) -> Tensor:
        """Return the probability of each expert, (X,), for a bag (N, D)."""
        return self.router_logits(bag).softmax(-1)


def load_expert(path: str | Path) -> SlideExpert:
    """Return the expert in a published ABMIL checkpoint.

    Raises:
        ArtifactError: not such a checkpoint; names the first tensor that does not fit.
    """
    tensors = _read(Path(path))
    module = Abmil(_shape(tensors, Path(path)))
    _fill(module, {name: tensors.pop(name, None) for name in _ATTENTION}, tensors, Path(path))
    return SlideExpert(module.requires_grad_(False))


def load_router(path: str | Path, *, top_k: int = 5) -> PublishedRouter:
    """Return the router in a published ROUPKT checkpoint, using its `top_k` likeliest experts.

    Raises:
        ArtifactError: not such a checkpoint; names the first tensor that does not fit.
    """
    path = Path(path)
    tensors = _read(path)
    if "router.weight" not in tensors:
        raise ArtifactError(path, "tensor router.weight is missing", "Give a ROUPKT checkpoint")
    experts = _rows(tensors, "router.weight", path)
    shape = _shape(tensors, path)
    module = Roupkt(shape, experts=experts, own_heads=False)
    known: dict[str, Tensor | None] = {name: tensors.pop(name, None) for name in _ATTENTION}
    known["router.weight"] = tensors.pop("router.weight")
    square = (shape.embed, shape.embed)
    for kind, name, want in (
        ("weight", "adapter", square),
        ("bias", "adapter_bias", square[:1]),
    ):
        rows = [
            _whole(tensors.pop(one, None), one, want, path)
            for one in (f"experts.{i}.0.{kind}" for i in range(experts))
        ]
        known[name] = torch.stack(rows)
    _fill(module, known, tensors, path)
    return PublishedRouter(module.requires_grad_(False), top_k=top_k)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # From memory: of a file, a pickle may ask for 4 GB at once, which Python would reserve.
        stream = BytesIO(path.read_bytes())
        content = torch.load(stream, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtifactError(path, "no such file", "Give the path of a checkpoint") from None
    except Exception as error:  # a damaged pickle can raise any of Python's errors
        raise ArtifactError(
            path, f"not a readable checkpoint ({type(error).__name__})", "Use the file as published"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ArtifactError(path, "holds no state dict of tensors", "Use the file as published")
    for tensor in content.values():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point() or _claims_more(tensor):
            raise ArtifactError(
                path, "holds a tensor that is not plain", "Use the file as published"
            )
    return {str(name): tensor.float() for name, tensor in content.items()}


def _claims_more(tensor: Tensor) -> bool:
    """Return whether a tensor is larger than what is stored of it: a copy could be any size."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _shape(tensors: dict[str, Tensor], path: Path) -> ExpertShape:
    try:
        embed, dim = tensors["feat_proj.0.weight"].shape
        return ExpertShape(
            dim=dim,
            embed=embed,
            attention=_rows(tensors, "attention_net.attention_a.0.weight", path),
            bins=_rows(tensors, "pred_head.weight", path),
        )
    except KeyError as error:
        raise ArtifactError(
            path, f"tensor {error.args[0]} is missing", "Give an ABMIL or ROUPKT checkpoint"
        ) from None
    except ValueError:
        raise ArtifactError(
            path,
            "its tensors feat_proj.0.weight, attention_net.attention_a.0.weight and "
            "pred_head.weight give no usable widths",
            "Use the file as published",
        ) from None


def _rows(tensors: dict[str, Tensor], name: str, path: Path) -> int:
    """Return the rows of a matrix of the checkpoint."""
    if tensors[name].ndim != 2 or not tensors[name].numel():
        raise ArtifactError(
            path,
            f"tensor {name} has shape {tuple(tensors[name].shape)}, expected a matrix",
            "Use the file as published",
        )
    return len(tensors[name])


def _fill(
    module: nn.Module, known: dict[str, Tensor | None], rest: dict[str, Tensor], path: Path
) -> None:
    """Copy the checkpoint's tensors into a stack of one; refuse what is missing or left over."""
    if rest:
        raise ArtifactError(path, f"unknown tensor {min(rest)}", "Use the loader of its model")
    parameters = dict(module.named_parameters())
    for name, tensor in known.items():
        target = parameters[_ATTENTION.get(name, "gate" if name == "router.weight" else name)]
        # One model of a stack: its leading ones are the stack's, but a score is a row anyway.
        want = target.shape if name == "attention_net.attention_c.weight" else target[0].shape
        if name.startswith("pred_head.") and isinstance(module, Roupkt):
            want = want[1:]  # one head for all experts
        target.data.copy_(_whole(tensor, name, tuple(want), path).view_as(target))


def _whole(tensor: Tensor | None, name: str, want: tuple[int, ...], path: Path) -> Tensor:
    """Return a tensor of the checkpoint that is there and has the shape it must have."""
    if tensor is None:
        raise ArtifactError(path, f"tensor {name} is missing", "Use a whole checkpoint")
    if tuple(tensor.shape) != want:
        raise ArtifactError(
            path,
            f"tensor {name} has shape {tuple(tensor.shape)}, expected {want}",
            "Use a checkpoint of one model",
        )
    return tensor
