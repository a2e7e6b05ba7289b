"""The names of the cancers, for a reader who does not know their codes."""

from __future__ import annotations

from cropkt.cancers import Cancer

NAMES: dict[str, str] = {
    Cancer.ACC: "adrenocortical carcinoma",
    Cancer.BLCA: "bladder cancer",
    Cancer.BRCA: "breast cancer",
    Cancer.CESC: "cervical cancer",
    Cancer.CHOL: "bile duct cancer",
    Cancer.COADREAD: "colorectal cancer",
    Cancer.DLBC: "diffuse large B-cell lymphoma",
    Cancer.GBMLGG: "glioma",
    Cancer.HNSC: "head and neck cancer",
    Cancer.KIPAN: "kidney cancer",
    Cancer.LIHC: "liver cancer",
    Cancer.LUNG: "lung cancer",
    Cancer.MESO: "mesothelioma",
    Cancer.OV: "ovarian cancer",
    Cancer.PAAD: "pancreatic cancer",
    Cancer.PCPG: "phaeochromocytoma and paraganglioma",
    Cancer.PRAD: "prostate cancer",
    Cancer.SARC: "sarcoma",
    Cancer.SKCM: "skin melanoma",
    Cancer.STES: "stomach and oesophageal cancer",
    Cancer.TGCT: "testicular cancer",
    Cancer.THCA: "thyroid cancer",
    Cancer.THYM: "thymoma",
    Cancer.UCEC: "endometrial cancer",
    Cancer.UCS: "uterine carcinosarcoma",
    Cancer.UVM: "uveal melanoma",
}


def named_in_full(code: str) -> str:
    """Return a code with its name: `UVM (uveal melanoma)`."""
    return f"{code} ({NAMES[code]})" if code in NAMES else code
