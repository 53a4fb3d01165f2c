"""What can be wrong with a file of records."""


class CaptureFileError(ValueError):
    """A file is no capture, is damaged, or holds what captures do not hold; the text names the file and the fault."""


class MissingExtraError(ModuleNotFoundError):
    """A package is not installed that an extra of kvkernels names."""


def missing_extra(what: str, package: str, extra: str) -> MissingExtraError:
    """The error for a package that is not there."""
    return MissingExtraError(f"{what} needs {package}, which is not installed: pip install kvkernels[{extra}]")
