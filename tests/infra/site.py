"""Values of an invented user, and the files of infra/ filled with them."""

from jobs.render import INFRA, PLACEHOLDER, fill

IMAGE = "registry.example/imgcls@sha256:" + "0123456789abcdef" * 4


def filled(path: str, **values: str) -> str:
    """infra/<path> with `values` by `section_key`; what they leave open is the key's own name, an image is `IMAGE`."""
    text = (INFRA / path).read_text()
    names = {name: values.get(name.replace(".", "_"), _invented(name)) for name in PLACEHOLDER.findall(text)}
    return fill(text, names)


def _invented(name: str) -> str:
    return IMAGE if name.endswith("image") else name.partition(".")[2].replace("_", "-")
