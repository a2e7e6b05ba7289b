"""The 26 TCGA cancers of CROPKT, and which TCGA studies make up each.

Five cancers merge two or three studies (arXiv 2508.13482, data section). LAML has no slides.
"""

from __future__ import annotations

from enum import StrEnum

from cropkt.errors import DataError


class Cancer(StrEnum):
    """Cancer code as a site, a card and a command line write it."""

    ACC = "ACC"
    BLCA = "BLCA"
    BRCA = "BRCA"
    CESC = "CESC"
    CHOL = "CHOL"
    COADREAD = "COADREAD"
    DLBC = "DLBC"
    GBMLGG = "GBMLGG"
    HNSC = "HNSC"
    KIPAN = "KIPAN"
    LIHC = "LIHC"
    LUNG = "LUNG"
    MESO = "MESO"
    OV = "OV"
    PAAD = "PAAD"
    PCPG = "PCPG"
    PRAD = "PRAD"
    SARC = "SARC"
    SKCM = "SKCM"
    STES = "STES"
    TGCT = "TGCT"
    THCA = "THCA"
    THYM = "THYM"
    UCEC = "UCEC"
    UCS = "UCS"
    UVM = "UVM"


MERGED_STUDIES: dict[str, Cancer] = {
    "COAD": Cancer.COADREAD,
    "READ": Cancer.COADREAD,
    "GBM": Cancer.GBMLGG,
    "LGG": Cancer.GBMLGG,
    "KIRC": Cancer.KIPAN,
    "KIRP": Cancer.KIPAN,
    "KICH": Cancer.KIPAN,
    "LUAD": Cancer.LUNG,
    "LUSC": Cancer.LUNG,
    "STAD": Cancer.STES,
    "ESCA": Cancer.STES,
}
"""TCGA study code to the cancer that contains it; a code not listed here stands for itself."""

COMMON_CANCERS: frozenset[Cancer] = frozenset(
    map(
        Cancer,
        [
            "BLCA",
            "BRCA",
            "CESC",
            "COADREAD",
            "GBMLGG",
            "HNSC",
            "KIPAN",
            "LIHC",
            "LUNG",
            "SARC",
            "SKCM",
            "STES",
            "UCEC",
        ],
    )
)
"""The 13 cancers with at least 200 patients and 5 % events; the other 13 are the rare set."""


def cancer_of(code: str) -> Cancer:
    """Return the cancer of a TCGA study or cancer code, in any case, `TCGA-` prefix or not.

    Raises:
        DataError: no such cancer.
    """
    name = code.strip().upper().removeprefix("TCGA-")
    try:
        return MERGED_STUDIES.get(name) or Cancer(name)
    except ValueError:
        known = " ".join(Cancer)
        raise DataError("cancer", f"unknown code {code!r}", f"Use one of {known}") from None
