"""Output of a command."""


def only_line(errors: list[str]) -> str:
    assert len(errors) == 1, errors
    assert errors[0].startswith("nanovlm: ")
    return errors[0]
