from __future__ import annotations

import contextlib
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cropkt.errors import ArtifactError, BagShapeError
from cropkt.published import load_expert, load_router

D, E, A, T, X = 5, 4, 3, 7, 3
EXPERT = {
    "feat_proj.0.weight": (E, D),
    "feat_proj.0.bias": (E,),
    "attention_net.attention_a.0.weight": (A, E),
    "attention_net.attention_a.0.bias": (A,),
    "attention_net.attention_b.0.weight": (A, E),
    "attention_net.attention_b.0.bias": (A,),
    "attention_net.attention_c.weight": (1, A),
    "attention_net.attention_c.bias": (1,),
    "pred_head.weight": (T, E),
    "pred_head.bias": (T,),
}
ROUTER = (
    EXPERT
    | {"router.weight": (X, E)}
    | {f"experts.{i}.0.weight": (E, E) for i in range(X)}
    | {f"experts.{i}.0.bias": (E,) for i in range(X)}
)
LOADERS = [(load_expert, EXPERT), (load_router, ROUTER)]


def draw(shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def save(content: object) -> Path:
        torch.save(content, tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return save


def slide_feature(tensors, bag):
    """The published forward pass of one bag."""
    linear = torch.nn.functional.linear

    def layer(x, name):
        return linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    hidden = layer(bag, "feat_proj.0").relu()
    gates = layer(hidden, "attention_net.attention_a.0").tanh()
    gates = gates * layer(hidden, "attention_net.attention_b.0").sigmoid()
    attention = layer(gates, "attention_net.attention_c").squeeze(1).softmax(0)
    return attention @ hidden


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"model": t, "epoch": 20}])
def test_an_expert_speaks_as_published(write, wrap) -> None:
    tensors, bag = draw(EXPERT), torch.randn(6, D)
    expert = load_expert(write(wrap(tensors)))
    feature = slide_feature(tensors, bag)
    logits = tensors["pred_head.weight"] @ feature + tensors["pred_head.bias"]
    assert torch.allclose(expert(bag), logits, atol=1e-5)
    assert torch.allclose(expert.slide_feature(bag), feature, atol=1e-5)
    assert expert.attention(bag).sum().item() == pytest.approx(1)
    assert not any(parameter.requires_grad for parameter in expert.parameters())


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_a_router_speaks_as_published(write, top_k) -> None:
    tensors, bag, features = draw(ROUTER), torch.randn(6, D), torch.randn(X, E)
    router = load_router(write(tensors), top_k=top_k)
    gates = (tensors["router.weight"] @ slide_feature(tensors, bag)).softmax(0)
    mixed = torch.zeros(E)
    for i in gates.argsort(descending=True)[:top_k]:  # not renormalised
        adapted = tensors[f"experts.{i}.0.weight"] @ features[i] + tensors[f"experts.{i}.0.bias"]
        mixed += gates[i] * adapted.relu()
    logits = tensors["pred_head.weight"] @ mixed + tensors["pred_head.bias"]
    assert torch.allclose(router.gates(bag), gates, atol=1e-5)
    assert torch.allclose(router(bag, features), logits, atol=1e-5)


def test_a_bag_of_another_width_is_refused(write) -> None:
    expert = load_expert(write(draw(EXPERT)))
    with pytest.raises(BagShapeError, match=r"\(2, 9\).*n_patches, 5"):
        expert(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("load", "name"), [(load, name) for load, shapes in LOADERS for name in shapes]
)
def test_a_missing_tensor_is_named(write, load, name) -> None:
    tensors = draw(EXPERT if load is load_expert else ROUTER)
    del tensors[name]
    with pytest.raises(ArtifactError, match=f"tensor {name} is missing"):
        load(write(tensors))


@pytest.mark.parametrize(
    ("load", "name", "change"),
    [
        (load, name, change)
        for load, shapes in LOADERS
        for name, old in shapes.items()
        for change in ("longer", "turned", "flat", "scalar", "empty")
        if change != "turned" or old != (E, E)  # a square turned is of the same shape
    ],
)
def test_a_misshapen_tensor_is_refused_by_name(write, load, name, change) -> None:
    tensors = draw(EXPERT if load is load_expert else ROUTER)
    old = tensors[name]
    new = {
        "longer": torch.cat([old, old]),
        "turned": old.t() if old.ndim == 2 else old[:, None],
        "flat": old.reshape(-1) if old.ndim == 2 else old[None],
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0),
    }[change]
    tensors[name] = new
    with pytest.raises(ArtifactError) as caught:
        load(write(tensors))
    if name in ("feat_proj.0.weight", "attention_net.attention_a.0.weight", "pred_head.weight"):
        assert "tensor" in str(caught.value)  # widths come from it: a neighbour may be named
    elif name == "router.weight" and change in ("longer", "turned"):
        assert "experts." in str(caught.value)
    else:
        assert name in str(caught.value)


@pytest.mark.parametrize(("load", "shapes"), LOADERS)
def test_an_unknown_tensor_is_named(write, load, shapes) -> None:
    with pytest.raises(ArtifactError, match=r"unknown tensor attention_net\.extra"):
        load(write(draw(shapes) | {"attention_net.extra": torch.zeros(1)}))


def test_one_model_in_the_loader_of_the_other(write) -> None:
    with pytest.raises(ArtifactError, match=r"router\.weight is missing.*ROUPKT"):
        load_router(write(draw(EXPERT)))
    with pytest.raises(ArtifactError, match=r"unknown tensor experts\.0\.0\.bias"):
        load_expert(write(draw(ROUTER)))


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("dump", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x, 2))])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: draw(EXPERT) | {"x": evil}])
def test_code_in_a_checkpoint_does_not_run(tmp_path, dump, wrap) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    dump(wrap(Evil(mark)), path)
    with pytest.raises(ArtifactError, match="not a readable checkpoint"):
        load_expert(path)
    assert not mark.exists()


def test_a_truncated_checkpoint_is_refused(write) -> None:
    path = write(draw(EXPERT))
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            load_expert(path)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_damaged_checkpoint_is_read_or_refused(tmp_path, legacy) -> None:
    path, rng = tmp_path / "model.pth", random.Random(0)
    torch.save(draw(EXPERT), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(min(len(whole), 1500))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ArtifactError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about protocols
            load_expert(path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04", b"\x80\x02K\x01."])
def test_another_file_is_refused(tmp_path, content) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"other\.pth"):
        load_expert(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": 3}, torch.zeros(2), {}, None])
def test_another_object_is_refused(write, content) -> None:
    with pytest.raises(ArtifactError):
        load_expert(write(content))
    with pytest.raises(ArtifactError):
        load_router(write(content))


def test_no_file_and_a_folder(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        load_expert(tmp_path / "absent.pth")
    with pytest.raises(ArtifactError):
        load_expert(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, dtype=torch.float64).expand(1 << 20, 1 << 20),  # 8 TB, if converted
        torch.zeros(E, D).to_sparse(),
        torch.zeros(E, D, device="meta"),
        torch.zeros(E, D, dtype=torch.complex64),
        torch.zeros(E, D, dtype=torch.int64),
    ],
)
def test_a_tensor_that_is_not_plain_is_refused(write, tensor) -> None:
    path = write(draw(EXPERT) | {"feat_proj.0.weight": tensor})
    with pytest.raises(ArtifactError, match="not plain"):
        load_expert(path)
