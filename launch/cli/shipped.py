"""Configs and job scripts that come with the installation, wherever the command is given."""

import textwrap
from pathlib import Path

SHIPPED = Path(__file__).resolve().parent.parent / "shipped"


def config_path(text: str) -> Path:
    """The config file that a command's argument names: a path, else a shipped one, as ``configs/demo.yaml`` or
    ``demo``. What is neither stays as it is."""
    path = Path(text)
    if not path.exists():
        shipped = SHIPPED / "configs" / f"{path.name.removesuffix('.yaml')}.yaml"
        if shipped.is_file() and path.parent in (Path(), Path("configs")):
            return shipped
    return path


def configs() -> dict[str, str]:
    """Every shipped config's name, and the first line of what it says of itself."""
    paths = sorted((SHIPPED / "configs").glob("*.yaml"))
    first = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}
    return {name: textwrap.shorten(line, 80, placeholder=" ...") for name, line in first.items()}
