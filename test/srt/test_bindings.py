"""Hooks reach every name under which modules hold what they wrap."""

import sys
import types

import pytest
from sglang_helix import bindings
from srt.fresh import Fresh


def names_of_hooked_functions(by_sglang: bool) -> dict[str, list[str]]:
    """By target of both stages: the names in modules that are bound to what took its place."""
    if by_sglang:
        bindings.apply_hooks_in_one_walk = lambda: None
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang_helix import plugin

    plugin.install_serve_stage()
    import pkgutil

    from sglang.srt.plugins.hook_registry import HookRegistry

    wrapped = {id(pkgutil.resolve_name(target)): target for target in HookRegistry._patched}
    names: dict[str, list[str]] = {target: [] for target in HookRegistry._patched}
    for key, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in wrapped:
                    names[wrapped[id(value)]].append(f"{key}.{name}")
    return names


def test_hooks_are_bound_where_sglang_binds_them(fresh: Fresh) -> None:
    names = fresh.value(names_of_hooked_functions, False)
    assert names == fresh.value(names_of_hooked_functions, True)
    assert max(map(len, names.values())) > 2


@pytest.mark.parametrize("known", [True, False])
def test_what_was_imported_since_is_found_too(known: bool) -> None:
    """Whether or not it was known which functions would be sought."""

    def one() -> None: ...
    def two() -> None: ...
    def three() -> None: ...

    home, early, late = (types.ModuleType(name) for name in ("home", "early", "late"))
    home.f = early.g = one
    sys.modules.update(home=home, early=early)
    try:
        walk = bindings.Bindings([one] if known else [])
        home.f = two
        assert walk.rebind(one, two, home) == 1
        assert early.g is two
        late.h, early.g2 = two, two  # as `from home import f` now does
        sys.modules["late"] = late
        home.f = three  # another hook on the same function, by another name
        assert walk.rebind(two, three, home) == 3
        assert late.h is early.g is early.g2 is three
        early.g = one  # bound to something else since it was read
        assert walk.rebind(three, one, home) == 2
        assert early.g is one
    finally:
        for name in ("home", "early", "late"):
            sys.modules.pop(name, None)
