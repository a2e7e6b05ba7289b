"""Order of the cancers in a heat map: organ systems, so that related cancers stand together.

After the organ systems that Hoadley et al. (doi:10.1016/j.cell.2018.03.022) use for the TCGA
studies, joined where one alone would hold a single cancer.
"""

from __future__ import annotations

from collections.abc import Iterable

from cropkt.cancers import Cancer

ORGAN_SYSTEMS: dict[str, tuple[Cancer, ...]] = {
    "breast and\ngynaecological": (Cancer.BRCA, Cancer.CESC, Cancer.OV, Cancer.UCEC, Cancer.UCS),
    "digestive": (Cancer.CHOL, Cancer.COADREAD, Cancer.LIHC, Cancer.PAAD, Cancer.STES),
    "head, neck\nand chest": (Cancer.HNSC, Cancer.LUNG, Cancer.MESO, Cancer.THYM),
    "urological": (Cancer.BLCA, Cancer.KIPAN, Cancer.PRAD, Cancer.TGCT),
    "brain and\nendocrine": (Cancer.ACC, Cancer.GBMLGG, Cancer.PCPG, Cancer.THCA),
    "melanocytic": (Cancer.SKCM, Cancer.UVM),
    "soft tissue\nand lymph": (Cancer.DLBC, Cancer.SARC),
}


def grouped(cancers: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return the given cancers by organ system, in a fixed order; unknown codes come last."""
    left = set(cancers)
    groups: list[tuple[str, list[str]]] = []
    for system, members in ORGAN_SYSTEMS.items():
        present = [str(cancer) for cancer in members if cancer in left]
        left.difference_update(present)
        if present:
            groups.append((system, present))
    return [*groups, ("other", sorted(left))] if left else groups
