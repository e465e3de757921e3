"""The catalogue maps model names to checkpoints, limits, engine settings and prices. `models.toml` holds it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any, cast

from complete_fn.errors import InputError, UnknownModelError, did_you_mean
from complete_fn.types import PriceBasis

BUILT_IN = Path(__file__).with_name("models.toml")


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million tokens, and the basis of the figures: an example, the user's own, metered, or unknown."""

    input: Decimal = Decimal(0)
    cached_input: Decimal = Decimal(0)
    output: Decimal = Decimal(0)
    currency: str = "USD"
    basis: PriceBasis = "unknown"


@dataclass(frozen=True, slots=True)
class Model:
    """One catalogue entry. `checkpoint` is a folder, `package:folder` inside an installed package, or a Hub id."""

    name: str
    checkpoint: str
    revision: str | None = None
    engine: str = "embedded"
    url: str | None = None
    api_key_env: str | None = None
    licence: str = "unknown"
    gated: bool = False
    download: str = "unknown"
    max_model_len: int | None = None
    default_max_tokens: int = 512
    prices: Prices = Prices()
    tried: str = "not tried"
    nodes: str = ""
    instructions: tuple[str, ...] = ()
    note: str = ""
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def local_folder(self) -> Path | None:
        """The checkpoint's folder if it is on this machine, else None (for a Hub id)."""
        if self.checkpoint.startswith("package:"):
            package, _, inside = self.checkpoint.removeprefix("package:").partition("/")
            return installed_folder(package) / inside
        folder = Path(self.checkpoint).expanduser()
        return folder.resolve() if folder.is_dir() else None

    @property
    def is_absent(self) -> bool:
        """Whether the checkpoint is a path that does not exist on this machine."""
        names_path = self.checkpoint.startswith(("/", "./", "../", "~"))
        return self.engine == "embedded" and names_path and self.local_folder is None


def installed_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UnknownModelError(f"The package {package!r} with the model's files is not installed.")
    return Path(next(iter(spec.submodule_search_locations)))


def parse_prices(table: Any, where: str) -> Prices:
    """Prices from a table like `{"input": 1.5, "output": 3}`; `where` begins the message of an error.

    Raises:
        InputError: The table has an unknown field, or a price that is no number of at least 0.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: prices = {table!r} is no table. Write prices = {{ input = 1.5, output = 3 }}.")
    known = {f.name for f in fields(Prices)}
    if unknown := set(table) - known:
        raise InputError(f"{where}: prices has no field {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}.")
    try:
        amounts = {k: Decimal(str(table[k])) for k in ("input", "cached_input", "output") if k in table}
    except InvalidOperation as error:
        raise InputError(f"{where}: a price is not a number: {dict(table)!r}.") from error
    if any(not a.is_finite() or a < 0 for a in amounts.values()):
        raise InputError(f"{where}: a price is negative or not finite: {dict(table)!r}.")
    basis = table.get("basis", "yours")
    if basis not in ("example", "yours", "metered"):
        raise InputError(f"{where}: price basis {basis!r} is not one of example, yours, metered.")
    return Prices(currency=str(table.get("currency", "USD")), basis=cast(PriceBasis, basis), **amounts)


TEXTS = ("checkpoint", "revision", "engine", "url", "api_key_env", "licence", "download", "tried", "nodes", "note")
NUMBERS = ("max_model_len", "default_max_tokens")


def refuse_types(name: str, table: Mapping[str, Any], where: str) -> None:
    """Raises:
    InputError: A field of the entry has a value of the wrong type.
    """
    is_texts = lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)  # noqa: E731
    forms: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(TEXTS, ("a text", lambda v: isinstance(v, str))),
        **dict.fromkeys(NUMBERS, ("a whole number above 0", lambda v: type(v) is int and v > 0)),
        "gated": ("true or false", lambda v: isinstance(v, bool)),
        "instructions": ("a list of texts", is_texts),
        "engine_args": ("a table", lambda v: isinstance(v, Mapping)),
    }
    for key, (form, fits) in forms.items():
        if key in table and not fits(table[key]):
            raise InputError(f"{where}: model {name!r}: {key} = {table[key]!r} is not {form}.")


def entry(name: str, table: Any, base: Model | None, where: str) -> Model:
    """A model from its TOML table. Fields that the table omits come from `base`, an older entry of the same name."""
    if not isinstance(table, Mapping):
        raise InputError(
            f"{where}: model {name!r} = {table!r} is no table. Write [models.{name}] and its fields below."
        )
    known = {f.name for f in fields(Model)} - {"name"}
    if unknown := set(table) - known:
        first = sorted(unknown)[0]
        raise InputError(f"{where}: model {name!r} has no field {first!r}.{did_you_mean(first, known)}")
    refuse_types(name, table, where)
    changes = dict(table)
    if "prices" in changes:
        changes["prices"] = parse_prices(changes["prices"], f"{where}: model {name!r}")
    if "instructions" in changes:
        changes["instructions"] = tuple(changes["instructions"])
    if base is not None:
        return replace(base, **changes)
    if "checkpoint" not in changes:
        if "url" not in changes:
            raise InputError(f"{where}: model {name!r} needs a checkpoint or a url.")
        changes["checkpoint"] = name
    if "url" in changes:
        changes.setdefault("engine", "http")
    return Model(name=name, **changes)


def load_catalogue(models_file: Path | None = None) -> dict[str, Model]:
    """All entries. The user's file overrides the built-in one.

    Raises:
        InputError: The file is missing, is not TOML, or has an unknown field or a value of the wrong type.
    """
    found: dict[str, Model] = dict(built_in())
    if models_file is not None:
        models = read_toml(models_file).get("models", {})
        if not isinstance(models, Mapping):
            raise InputError(f"{models_file}: models = {models!r} is no table. Write [models.NAME] for each model.")
        for name, table in models.items():
            found[name] = entry(name, table, found.get(name), str(models_file))
    return found


@cache
def built_in() -> dict[str, Model]:
    return {n: entry(n, t, None, BUILT_IN.name) for n, t in read_toml(BUILT_IN)["models"].items()}


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"The catalogue file {str(path)!r} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"The catalogue file {str(path)!r} is not TOML: {error}.") from error


def find_model(name: str, models_file: Path | None = None) -> Model:
    """The catalogue's entry of this name, or a model made from a local folder or a Hub id (`owner/name`).

    Raises:
        UnknownModelError: The name is none of these; the message has the nearest name.
    """
    catalogue = load_catalogue(models_file)
    if name in catalogue:
        return catalogue[name]
    if not isinstance(name, str) or not name.strip():
        raise UnknownModelError(f"Model {name!r} is not a name. `complete-fn models` lists all.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Model(name=name, checkpoint=str(folder.resolve()), note="a local folder")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Model(name=name, checkpoint=name, note="from the Hub")
    hint = did_you_mean(name, catalogue, cutoff=0.5)
    raise UnknownModelError(f"Model {name!r} is not in the catalogue.{hint} `complete-fn models` lists all.")
