"""One short file per model family: the names of its modules and the order of their rows.

This folder is in the root of the repository and is installed as ``peft_lorasuite.converters``.
"""

if __name__ != "peft_lorasuite.converters":
    raise ImportError(
        f"the converters were imported as {__name__!r} (wanted 'peft_lorasuite.converters'); "
        "run pip install -e . and import peft_lorasuite.converters"
    )
