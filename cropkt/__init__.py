"""Federated transfer of cancer-specific survival experts: science and contracts, no network.

`load_expert` gives one expert as a plain torch module, `SurvivalEstimator` gives a model the
methods of scikit-survival.
"""

from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
    from cropkt.estimators import SurvivalEstimator, load_expert

    __all__ = ["SurvivalEstimator", "load_expert"]
else:

    def __getattr__(name: str) -> Any:
        """Return a name when it is asked for: at import, it would cost `--help` its half second."""
        if name in ("SurvivalEstimator", "load_expert"):
            from cropkt import estimators

            return getattr(estimators, name)
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("cropkt")
        except PackageNotFoundError:
            return "0+source"  # a source tree on PYTHONPATH, never installed
