"""Packages that only an extra installs: where one is missing, the error names the extra."""

from importlib.util import find_spec


class MissingExtra(ImportError):
    """A package of an extra is not installed."""


def require(module: str, *packages: str) -> None:
    """Check that `packages`, which the extra `train` installs, are there. Loads none of them.

    Raises:
        MissingExtra: what `module` lacks, and the command that installs it, in one line.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"{module}: got no {', '.join(missing)}, expected the extra `train`; "
            "pip install 'dgrpo[train]'"
        )
