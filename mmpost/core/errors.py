"""One error type for everything a user can cause, with a code, a cause and a way out."""

from __future__ import annotations

# Exit codes of the command line by the letter of the error code; single codes may differ.
EXIT_BY_FAMILY = {"C": 2, "D": 3, "E": 4, "R": 6, "T": 1, "V": 7, "X": 1}
EXIT_BY_CODE = {"MMP-T001": 5}


class MmpostError(Exception):
    """A problem that the user can fix.

    Attributes:
        code: ``MMP-`` plus a family letter and three digits: C config, D data, E environment, R rewards and RL,
            T training, V evaluation, X export.
        what: The offending value and where it came from.
        fix: What to do about it, as an imperative; may be empty when ``what`` already says it.
    """

    def __init__(self, code: str, what: str, fix: str = "") -> None:
        super().__init__(code, what, fix)  # all arguments, so that the error survives pickling between processes
        self.code, self.what, self.fix = code, what, fix

    def __str__(self) -> str:
        text = self.what if not self.fix else f"{self.what} {self.fix}"
        return f"{text} [{self.code}]"

    @property
    def exit_code(self) -> int:
        """Exit status that the command line returns for this error."""
        return EXIT_BY_CODE.get(self.code, EXIT_BY_FAMILY.get(self.code[4:5], 1))


class ManyErrors(MmpostError):
    """Several errors found in one pass; printed together, so that they can be fixed together.

    Attributes:
        errors: All of them, in the order of the file.
    """

    SHOWN = 20

    def __init__(self, errors: list[MmpostError]) -> None:
        first = errors[0]
        super().__init__(first.code, first.what, first.fix)
        self.args = (errors,)
        self.errors = errors

    def __str__(self) -> str:
        lines = [str(error) for error in self.errors[: self.SHOWN]]
        if len(self.errors) > self.SHOWN:
            lines.append(f"... and {len(self.errors) - self.SHOWN} more")
        return "\n".join(lines)


def raise_all(errors: list[MmpostError]) -> None:
    """Raise nothing, the one error, or all of them as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ManyErrors(errors)
