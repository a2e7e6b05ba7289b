"""Federated transfer of cancer-specific survival experts: science and contracts, no network."""

from typing import TYPE_CHECKING

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """Return `__version__` when asked; reading it at import would cost `--help` 60 ms."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("cropkt")
        except PackageNotFoundError:
            return "0+source"  # a source tree on PYTHONPATH, never installed
