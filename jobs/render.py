"""Fill the files of infra/ with what is yours: region, subnets, roles, images."""

import re
from pathlib import Path
from typing import Annotated

import tyro

from imgcls import storage
from imgcls.errors import RecipeError
from jobs._door import DONE, enter
from jobs._terminal import Lines

INFRA = Path(__file__).parent.parent / "infra"
PLACEHOLDER = re.compile(r"\$\{([a-z]+\.[a-z_]+)\}")
PLAIN = re.compile(r"[\w~/][\w~/.:@,+=-]*(?<!:)")
"""Text that is the same in YAML with and without quotes, unless it is a number or the like."""
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")


def render(
    site: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SITE")],
    to: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    verbose: bool = False,
) -> int:
    """Show the lines of infra/ that your values fill; with --to, write the files.

    Args:
        site: Your copy of infra/site.yaml.
        to: Folder for the filled files; a file that is there is written again.
        verbose: Tracebacks too.
    """
    if to is not None and INFRA in (to.resolve(), *to.resolve().parents):
        raise RecipeError(f"--to {to} is where the files to fill are\n  do: name another folder, as filled")
    texts, lines = templates(), Lines()
    values = read_site(site, {name for text in texts.values() for name in PLACEHOLDER.findall(text)})
    for path, text in texts.items():
        if set(PLACEHOLDER.findall(text)) <= values.keys():
            lines.say(str(path))
            for line in filter(PLACEHOLDER.search, text.splitlines()):
                lines.say(f"  {fill(line, values).strip()}")
            if to is not None:
                storage.write_bytes(storage.absolute(str(to / path)), fill(text, values).encode())
    lines.say("nothing is written; --to FOLDER writes these files" if to is None else f"written to {to}")
    return DONE


def templates() -> dict[Path, str]:
    """The files of infra/ that have placeholders, by their paths below it."""
    texts = {file.relative_to(INFRA): file.read_text(encoding="utf-8") for file in sorted(INFRA.rglob("*.yaml"))}
    return {path: text for path, text in texts.items() if PLACEHOLDER.search(text)}


def fill(text: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values[match[1]], text)


def read_site(path: Path, needed: set[str]) -> dict[str, str]:
    """Values by `section.key`, of the sections that have any. Raises RecipeError, with all that is missing or wrong."""
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        given = {f"{section}.{key}": value for section, keys in sections.items() for key, value in (keys or {}).items()}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: no sections of `key: value`: {error}\n  do: fill a copy of infra/site.yaml") from None
    values = {name: value for name, value in given.items() if value not in ("", None)}
    begun = {name.partition(".")[0] for name in values or needed}
    faults = [f"{name} is missing" for name in sorted(needed - values.keys()) if name.partition(".")[0] in begun]
    faults += [f"{name} is not a value of infra/site.yaml" for name in sorted(given.keys() - needed)]
    for name, value in values.items():
        plain = isinstance(value, str) and PLAIN.fullmatch(value)
        if not plain or yaml.SafeLoader("").resolve(yaml.ScalarNode, value, (True, False)) != "tag:yaml.org,2002:str":
            faults.append(f"{name}: {value!r} is not plain text: letters, digits, ~/.:@,+=_- and no number")
        elif name.endswith("image") and not DIGEST.fullmatch(value):
            faults.append(f"{name}: {value} has no digest, as in registry/name@sha256:...")
    if faults:
        listed = "\n".join(f"{path}: {fault}" for fault in faults)
        raise RecipeError(f"{listed}\n  do: infra/site.yaml says what each value is")
    return values


if __name__ == "__main__":
    enter(render)
