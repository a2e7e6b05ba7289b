"""What the commands of some pages find before them, by the names of `cropkt_docs.blocks.GIVEN`."""

from __future__ import annotations

import csv
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cropkt.cancers import Cancer
from cropkt.cohort.features import write_slide_h5
from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.artifact import Artifact
from cropkt.experts.card import verified
from cropkt.messages import ExpertRequest, ReleaseRequest, RouterRequest
from cropkt_client import tasks
from cropkt_client.site import Site
from cropkt_docs.shell import Shell
from cropkt_sim.practice import ENCODER, write_hospital

Give = Callable[[str], None]
UVM, CHOL = Cancer.UVM, Cancer.CHOL


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (home := tmp_path / "home").mkdir()
    place = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    one = Shell(tmp_path, PATH=place, HOME=str(home), COLUMNS="120")
    yield one
    one.close()


@pytest.fixture
def give(shell: Shell) -> Iterator[Give]:
    """Return what lays something down in the folder where the shell is."""
    started: list[Path] = []

    def give(name: str) -> None:
        folder = Path(shell.run("pwd")[0].strip())
        match name:
            case "study":
                study(shell, "study")
            case "hospital":
                started.append(folder / "there")
                hospital(shell)
            case "released":
                released(folder)
            case "published":
                published(folder)
            case "tcga_cdr":
                tcga_cdr(folder / "tcga_cdr.csv")

    yield give
    for folder in started:
        shell.run(f"cropkt-server stop {folder}")


def type_in(shell: Shell, *commands: str) -> None:
    """Run commands, all of which have to succeed."""
    for command in commands:
        said, code = shell.run(command)
        assert code == 0, said


def study(shell: Shell, folder: str) -> None:
    """Make a study of this machine that leiden is invited to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    type_in(
        shell,
        f"cropkt-server init {folder} --study rare --host 127.0.0.1:{port} --encoder {ENCODER}",
        f"sed -i 's/listen: 0.0.0.0/listen: 127.0.0.1/; s/dim: 1536/dim: 32/' {folder}/study.yaml",
        f"cropkt-server invite {folder} --site leiden --cancer UVM > {folder}/leiden.invite",
    )


def hospital(shell: Shell) -> None:
    """Enrol a hospital at a coordinator that runs."""
    study(shell, "there")
    type_in(
        shell,
        "cropkt-sim hospital . --cancer UVM",
        "cropkt-server start there --detach",
        "cropkt-client enrol there/leiden.invite --config site.yaml",
        f"sed -i 's/encoder: \"\"/encoder: {ENCODER}/' site.yaml",
    )


def released(folder: Path) -> None:
    """Do at a hospital what a small study asks, with an expert of one other cancer."""
    small = StudyConfig(
        folds=3,
        arms=("auto",),
        shape=ExpertShape(dim=32, embed=8, attention=4),
        training=TrainingConfig(epochs=2),
        router=RouterConfig(epochs=1),
    )
    here, other = practice(folder, UVM), practice(folder / "other", CHOL)
    own = tasks.fit_expert(ExpertRequest(task="t", study=small, cancer=UVM), here)
    theirs = tasks.fit_expert(ExpertRequest(task="t", study=small, cancer=CHOL), other)
    assert own.signed is not None
    assert theirs.signed is not None
    tasks.fit_router(
        RouterRequest(
            task="t",
            study=small,
            cancer=UVM,
            sources=(CHOL,),
            weights=theirs.weights,
            signed=(theirs.signed,),
        ),
        here,
    )
    tasks.release(ReleaseRequest(task="t", study=small, cancer=UVM), here)
    card, signature = verified(own.signed.card, own.signed.signature), own.signed.signature
    expert = Artifact(card=card, weights=own.weights, signature=signature).save(folder)
    expert.rename(folder / "UVM-0f3c5a7b9d1e2f40.safetensors")
    with (folder / "patients.csv").open("w", newline="") as file:
        slides = (path.stem for path in (folder / "features").iterdir())
        csv.writer(file).writerows([("patient_id", "slide_id"), *((one, one) for one in slides)])
    new = folder / "new" / "VB-2024-0173"
    new.parent.mkdir()
    grid = 256 * np.stack([np.arange(20) % 5, np.arange(20) // 5], axis=1)
    rng = np.random.default_rng(0)
    write_slide_h5(new.with_suffix(".h5"), rng.normal(size=(20, 32)).astype(np.float32), grid)
    with h5py.File(new.with_suffix(".h5"), "r+") as slide:  # as TRIDENT says it
        slide["coords"].attrs.update(level0_width=1280, level0_height=1024, patch_size_level0=256)
    Image.new("RGB", (50, 40), "white").save(new.with_suffix(".png"))


def practice(folder: Path, cancer: Cancer) -> Site:
    """Return a hospital of synthetic patients."""
    for _ in write_hospital(folder, cancer, seed=0):
        pass
    config = {
        "site": f"site-{cancer}",
        "cancers": [str(cancer)],
        "outcomes": "outcomes.csv",
        "slides": ["features"],
        "release": {"approval": "auto"},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(config))
    return Site.load(folder / "site.yaml")


def published(folder: Path) -> None:
    """Write an expert, three others and their router under the names of the published tensors."""
    width, embed, attention, bins, others = 24, 8, 4, 32, 3
    expert = {
        "feat_proj.0": (embed, width),
        "attention_net.attention_a.0": (attention, embed),
        "attention_net.attention_b.0": (attention, embed),
        "attention_net.attention_c": (1, attention),
        "pred_head": (bins, embed),
    }
    router = {f"experts.{number}.0": (embed, embed) for number in range(others)}
    (folder / "others").mkdir()
    for name in ("abmil", *(f"others/{number}" for number in range(others))):
        checkpoint(folder / f"{name}.pth", expert)
    gate = {"router.weight": torch.randn(others, embed)}
    checkpoint(folder / "roupkt.pth", {**expert, **router}, gate)


def checkpoint(
    path: Path, layers: dict[str, tuple[int, int]], further: dict[str, torch.Tensor] | None = None
) -> None:
    """Write random weights and biases of layers."""
    tensors = dict(further or {})
    for name, shape in layers.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            torch.randn(shape),
            torch.randn(shape[0]),
        )
    torch.save({"model": tensors, "epoch": 20}, path)


def tcga_cdr(path: Path) -> None:
    """Write 120 made-up patients of two cancers and six hospitals."""
    rng = np.random.default_rng(0)
    columns = (
        "bcr_patient_barcode,type,age_at_initial_pathologic_diagnosis,gender,"
        "ajcc_pathologic_tumor_stage,clinical_stage,histological_grade,DSS,DSS.time"
    )
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns.split(","))
        for i in range(120):
            age, event = int(rng.integers(30, 90)), int(rng.random() < 0.6)
            days = int(rng.exponential(60_000 / age)) + 1
            name, cancer = f"TCGA-H{i % 6}-{i:04d}", (UVM, CHOL)[i % 2]
            table.writerow([name, cancer, age, "MALE", "Stage II", "", "G2", event, days])
