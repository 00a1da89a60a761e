"""One walk over what modules hold, in place of one for each hook.

Python's ``from module import name`` copies a reference, so SGLang's HookRegistry looks for every
function that it has wrapped in all attributes of all modules, some 300,000: 50 ms for each hook,
and for this series' hundred hooks several seconds of every process that starts.
"""

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType

from sglang.srt.plugins import hook_registry
from sglang.srt.plugins.hook_registry import HookRegistry


class Bindings:
    """Which names of which modules are bound to what will be sought, `sought` and what replaces it.

    After an import, modules are read that have more or fewer names than before it. For anything
    else that is sought all are read again, unless it was imported since: so was who holds it.
    """

    def __init__(self, sought: Iterable[object] = ()) -> None:
        self._sought = set(map(id, sought))
        self._before = frozenset(sys.modules)
        self._names: dict[int, list[tuple[ModuleType, str]]] = defaultdict(list)
        self._sizes: dict[int, int] = {}
        self._imported = 0

    def rebind(self, original: object, wrapped: object, source: object) -> int:
        """In the place of SGLang's ``_propagate_patch``, which says what it is given and returns.

        original: what other modules than `source` may still hold under any name.
        wrapped: what they shall hold instead; `source`, a module or class, has it already.
        """
        home = source.__name__ if isinstance(source, ModuleType) else source.__module__
        if id(original) not in self._sought and home in self._before:
            self._sizes.clear()
            self._imported = 0
        self._sought |= {id(original), id(wrapped)}
        if self._imported != len(sys.modules):
            self._read_what_changed()
        # An id may have passed from an object that is gone to another, a name to another value.
        held = [
            (module, name)
            for module, name in dict.fromkeys(self._names.pop(id(original), ()))
            if module is not source and vars(module).get(name) is original
        ]
        for module, name in held:
            setattr(module, name, wrapped)
            self._names[id(wrapped)].append((module, name))
        if isinstance(source, ModuleType):
            self._read(source)
        return len(held)

    def _read_what_changed(self) -> None:
        modules = list(sys.modules.values())
        self._imported = len(modules)
        for module in modules:
            if isinstance(module, ModuleType) and self._sizes.get(id(module)) != len(vars(module)):
                self._read(module)

    def _read(self, module: ModuleType) -> None:
        sought = self._sought
        self._sizes[id(module)] = len(vars(module))
        for name, value in vars(module).items():
            if id(value) in sought:
                self._names[id(value)].append((module, name))


def apply_hooks_in_one_walk() -> None:
    """From now on HookRegistry finds names by `Bindings`, made anew whenever it applies hooks."""
    HookRegistry.apply_hooks = classmethod(partial(_apply_hooks, HookRegistry.apply_hooks.__func__))


def _apply_hooks(original: Callable[[type[HookRegistry]], None], cls: type[HookRegistry]) -> None:
    walk, collects = hook_registry._propagate_patch, gc.isenabled()
    hook_registry._propagate_patch = Bindings(_imported(cls._hooks.keys() - cls._patched)).rebind
    gc.disable()  # it would look through all that SGLang has imported, several times over
    try:
        original(cls)
    finally:
        hook_registry._propagate_patch = walk
        if collects:
            gc.enable()


def _imported(targets: Iterable[str]) -> Iterator[object]:
    """What hooks wrap, of modules that are imported: no other is sought more than once."""
    for target in targets:
        module = target
        while module and module not in sys.modules:
            module = module.rpartition(".")[0]
        found: object = sys.modules.get(module)
        for name in target[len(module) + 1 :].split("."):
            found = getattr(found, name, None)
        yield getattr(found, "__func__", found)  # of a class method
