"""Libraries that come with extras."""

import importlib.util


def need(library: str, extra: str, what: str) -> None:
    """Raise an ImportError that names the extra where a library is missing.

    Args:
        library: as it is imported.
        extra: that brings it.
        what: needs it, as the start of the message.
    """
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(
            f"{what} need {library}: pip install 'temporal-excite[{extra}]'", name=library
        )
