"""Which installed model a hub name means. The hub is not asked."""

from __future__ import annotations

from collections.abc import Iterable

from edgeinfer_models.hub_choice import ambiguous, candidates, choose, matching, shards_of
from edgeinfer_models.hub_name import HubName, is_hub_name, parse_hub_name
from edgeinfer_models.store import InstalledModel, find_model, list_models


def find_hub_model(spec: str) -> InstalledModel | None:
    """None if it is not there. Raises ModelNotFound for what is no hub name or could be several
    installed models, ModelFileInvalid."""
    wanted = parse_hub_name(spec)
    exact = find_model(spec) if wanted.file else None
    if exact is not None:
        return exact
    models = {model.name: model for model in list_models().models}
    name = matching_name(wanted, models)
    return None if name is None else models[name]


def matching_name(wanted: HubName, names: Iterable[str], *, alone: bool = False) -> str | None:
    """The one of these whole names that is meant by a name without its file, or with a quantization in
    its place; None if none is.

    alone: no choice among several. Raises ModelNotFound if it could be several.
    """
    known = [parse_hub_name(name) for name in names if is_hub_name(name)]
    known = [name for name in known if (name.repo, name.revision) == (wanted.repo, wanted.revision)]
    paths = [path for name in known for path in shards_of(name.file) or (name.file,)]
    found = matching(wanted.file, candidates(paths))
    if not found:
        return None
    if alone and len(found) > 1:
        raise ambiguous(wanted, found)
    chosen = choose(wanted, paths).model.path
    return next(str(name) for name in known if name.file == chosen)
