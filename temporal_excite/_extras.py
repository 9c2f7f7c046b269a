"""Optional dependencies."""

import importlib.util


def need(library: str, extra: str, what: str) -> None:
    """Raise a ``ModuleNotFoundError`` that names the extra if a library is missing.

    Args:
        library: its import name.
        extra: the extra that installs it.
        what: what needs it, in the plural: the start of the message.
    """
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(
            f"{what} need {library}: pip install 'temporal-excite[{extra}]'", name=library
        )
