"""What single expressions of a script mean: devices, entropy, sets, files. Nothing is run.

Every function takes nodes of one parsed file and a :class:`Names`, and answers a question about
them. The walk in execution order is in ``static_check``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_DEVICE = re.compile(r"(cuda|xpu|mps|hpu|npu|xla|hip)(:|$)")
_DEVICE_KEYWORDS = {"device", "device_type", "map_location"}
_DEVICE_CALLS = {"torch.device", "torch.autocast", "torch.amp.autocast", "torch.amp.GradScaler"}
_DEVICE_SETTERS = {"torch.cuda.set_device", "torch.set_default_device", "torch.xpu.set_device"}

_ALWAYS_ENTROPY = {
    "os.urandom",
    "os.getrandom",
    "random.SystemRandom",
    "torch.seed",
    "torch.random.seed",
    "torch.cuda.seed",
    "torch.cuda.seed_all",
    "uuid.uuid1",
    "uuid.uuid4",
}
_ENTROPY_WITHOUT_A_SEED = {
    "numpy.random.MT19937",
    "numpy.random.PCG64",
    "numpy.random.Philox",
    "numpy.random.RandomState",
    "numpy.random.SeedSequence",
    "numpy.random.default_rng",
    "numpy.random.seed",
    "random.Random",
    "random.seed",
}
_SEEDERS = _ENTROPY_WITHOUT_A_SEED | {
    "torch.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
}
_SEED_METHODS = {"manual_seed", "seed"}
_CLOCKS = re.compile(
    r"time\.(time|monotonic|perf_counter|process_time)(_ns)?$|os\.getp?pid$"
    r"|datetime\.(datetime\.)?(now|utcnow|today)$"
)

_INT_CALLS = {"abs", "hash", "id", "int", "len", "ord", "round"}
_SET_METHODS = {"copy", "difference", "intersection", "symmetric_difference", "union"}
_ORDER_TAKERS = {"dict.fromkeys", "enumerate", "filter", "iter", "list", "map", "tuple", "zip"}
_ORDER_FREE = {"all", "any", "frozenset", "len", "max", "min", "set", "sorted", "sum"}
_ORDER_FREE |= {"collections.Counter"}

_DELETES = {
    "os.remove",
    "os.removedirs",
    "os.rename",
    "os.replace",
    "os.rmdir",
    "os.truncate",
    "os.unlink",
    "shutil.move",
    "shutil.rmtree",
}
_SAVES = {
    "numpy.save",
    "numpy.savetxt",
    "numpy.savez",
    "numpy.savez_compressed",
    "safetensors.torch.save_file",
    "torch.save",
}
_SAVE_METHODS = {"savefig", "to_csv", "to_json", "to_parquet", "write_bytes", "write_text"}
_BINDS = {
    "http.server.HTTPServer",
    "http.server.ThreadingHTTPServer",
    "prometheus_client.start_http_server",
    "socket.create_server",
    "socketserver.TCPServer",
    "socketserver.UDPServer",
}
_NOWHERE = {"/dev/null", "os.devnull"}


class Names:
    """The file's imports, so that ``np.random.seed`` is known as ``numpy.random.seed``."""

    def __init__(self, tree: ast.Module) -> None:
        self._aliases: dict[str, str] = {}
        self.modules: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    self.modules.add(name.name)
                    if name.asname:
                        self._aliases[name.asname] = name.name
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.modules.add(node.module)
                for name in node.names:
                    self._aliases[name.asname or name.name] = f"{node.module}.{name.name}"

    def dotted(self, node: ast.AST) -> str:
        """``numpy.random.default_rng`` for ``np.random.default_rng``; "" for what has no name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        parts.append(self._aliases.get(node.id, node.id))
        return ".".join(reversed(parts))


def argument(call: ast.Call, position: int, keyword: str) -> ast.expr | None:
    """The argument at a position or under a keyword."""
    if len(call.args) > position and not isinstance(call.args[position], ast.Starred):
        return call.args[position]
    return next((k.value for k in call.keywords if k.arg == keyword), None)


def text_of(node: ast.AST | None) -> str:
    """A string literal's text, else ""."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


# -- devices ------------------------------------------------------------------------------


def _names_a_device(node: ast.AST | None) -> bool:
    if isinstance(node, ast.IfExp):
        return _names_a_device(node.body) or _names_a_device(node.orelse)
    if isinstance(node, ast.BoolOp):
        return any(_names_a_device(value) for value in node.values)
    if isinstance(node, ast.JoinedStr) and node.values:
        return _names_a_device(node.values[0])
    return bool(_DEVICE.match(text_of(node)))


def hard_coded_device(node: ast.AST, names: Names) -> bool:
    """True where the node itself ties the script to one vendor's devices."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        called_device = any("device" in names.dotted(target).lower() for target in targets)
        return called_device and _names_a_device(node.value)
    if isinstance(node, ast.arguments):
        pairs = [*zip(reversed(node.args), reversed(node.defaults), strict=False)]
        pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d]
        return any("device" in arg.arg and _names_a_device(value) for arg, value in pairs)
    if not isinstance(node, ast.Call):
        return False
    called = names.dotted(node.func)
    first = node.args[0] if node.args else None
    if called in _DEVICE_SETTERS:
        return called != "torch.set_default_device" or _names_a_device(first)
    if any(k.arg in _DEVICE_KEYWORDS and _names_a_device(k.value) for k in node.keywords):
        return True
    if called in _DEVICE_CALLS and _names_a_device(first):
        return True
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in {"cuda", "xpu"}:
            return True
        if node.func.attr == "to" and _names_a_device(first):
            return True
        if node.func.attr == "add_argument" and "device" in text_of(first):
            return _names_a_device(argument(node, 99, "default"))
    return False


# -- entropy ------------------------------------------------------------------------------


def unseeded_entropy(call: ast.Call, names: Names) -> str:
    """The name of a call whose result differs between two copies of the script, else ""."""
    called = names.dotted(call.func)
    given = [*call.args, *(k.value for k in call.keywords)]
    if called in _ALWAYS_ENTROPY or called.startswith("secrets."):
        return called
    empty = all(isinstance(value, ast.Constant) and value.value is None for value in given)
    if called in _ENTROPY_WITHOUT_A_SEED and empty:
        return called
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method == "seed" and not given and called not in _ALWAYS_ENTROPY:
        return called or ".seed"
    seeds = called in _SEEDERS or method in _SEED_METHODS
    if seeds and any(_reads_a_clock(value, names) for value in given):
        return f"{called or '.' + method} from a clock or process number"
    return ""


def _reads_a_clock(node: ast.expr, names: Names) -> bool:
    calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
    return any(_CLOCKS.search(names.dotted(call.func)) for call in calls)


# -- sets ---------------------------------------------------------------------------------


def _is_empty(node: ast.expr) -> bool:
    """True for ``set()``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "set"
        and not node.args
    )


class Sets:
    """Which expressions are sets whose order may differ between two processes."""

    def __init__(self, tree: ast.Module, names: Names) -> None:
        self._names = names
        self._parents = {c: p for p in ast.walk(tree) for c in ast.iter_child_nodes(p)}
        self._sets: set[str] = set()
        self._sorted: set[str] = set()
        grown: set[str] = set()  # empty sets that something else than ints is put into
        assigned: list[tuple[str, ast.expr]] = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assigned += [(names.dotted(t), node.value) for t in targets if names.dotted(t)]
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name = names.dotted(node.func.value)
            if node.func.attr == "sort":
                self._sorted.add(name)
            elif (node.func.attr == "add" and not all(map(self._is_int, node.args))) or (
                node.func.attr == "update" and not all(map(self._are_ints, node.args))
            ):
                grown.add(name)
        for _ in range(3):  # a set made from a set that is named further down
            sets = {n for n, v in assigned if self.unordered(v) or (n in grown and _is_empty(v))}
            # A name that is also something else, such as the sorted list, is not followed.
            self._sets = sets - {n for n, v in assigned if not self._is_a_set(v)}

    def unordered(self, node: ast.expr) -> bool:
        """True for a set of something else than ints, as far as can be seen."""
        if isinstance(node, ast.Set):
            return not all(self._is_int(item) for item in node.elts)
        if isinstance(node, ast.SetComp):
            return not self._is_int(node.elt)
        if isinstance(node, ast.BinOp) and isinstance(
            node.op, (ast.BitAnd, ast.BitOr, ast.BitXor, ast.Sub)
        ):
            return self.unordered(node.left) or (
                not isinstance(node.op, ast.Sub) and self.unordered(node.right)
            )
        if isinstance(node, ast.Call):
            called = self._names.dotted(node.func)
            if called in {"set", "frozenset"}:
                return bool(node.args) and not self._are_ints(node.args[0])
            if isinstance(node.func, ast.Attribute) and node.func.attr in _SET_METHODS:
                return self.unordered(node.func.value)
            return False
        return self._names.dotted(node) in self._sets and bool(self._names.dotted(node))

    def _is_a_set(self, node: ast.expr) -> bool:
        return self.unordered(node) or _is_empty(node)

    def _is_int(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Constant):
            return isinstance(node.value, int)
        if isinstance(node, ast.BinOp):
            return self._is_int(node.left) and self._is_int(node.right)
        return isinstance(node, ast.Call) and self._names.dotted(node.func) in _INT_CALLS

    def _are_ints(self, node: ast.expr) -> bool:
        """True for an iterable of ints, as far as can be seen."""
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return all(self._is_int(item) for item in node.elts)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            return self._is_int(node.elt)
        if isinstance(node, ast.Call):
            called = self._names.dotted(node.func)
            if called == "map" and node.args:
                return self._names.dotted(node.args[0]) in _INT_CALLS
            # A tensor's or an array's numbers; an array of text is rare enough.
            return called == "range" or (
                isinstance(node.func, ast.Attribute) and node.func.attr == "tolist"
            )
        return False

    def order_used(self, node: ast.AST) -> bool:
        """True where the node takes the order of such a set for real."""
        if isinstance(node, (ast.For, ast.AsyncFor)):
            return self.unordered(node.iter)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)):
            first = any(self.unordered(part.iter) for part in node.generators)
            return first and not self._order_is_dropped(node)
        if isinstance(node, ast.Starred):
            parent = self._parents.get(node)
            return self.unordered(node.value) and isinstance(parent, (ast.List, ast.Tuple))
        if isinstance(node, ast.Assign):
            unpacks = any(isinstance(target, (ast.Tuple, ast.List)) for target in node.targets)
            return unpacks and self.unordered(node.value)
        if not isinstance(node, ast.Call):
            return False
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "pop" and not node.args:
                return self.unordered(node.func.value)
            if node.func.attr == "join" and node.args:
                return self.unordered(node.args[0])
        taken = self._names.dotted(node.func) in _ORDER_TAKERS
        return (
            taken
            and any(self.unordered(value) for value in node.args)
            and not self._order_is_dropped(node)
        )

    def _order_is_dropped(self, node: ast.AST) -> bool:
        """True under ``sorted(...)`` and the like, or when the list is sorted by name later."""
        parent = self._parents.get(node)
        while isinstance(parent, ast.Call):
            if self._names.dotted(parent.func) in _ORDER_FREE:
                return True
            if self._names.dotted(parent.func) not in _ORDER_TAKERS:
                return False
            parent = self._parents.get(parent)
        if isinstance(parent, ast.Assign):
            return any(self._names.dotted(target) in self._sorted for target in parent.targets)
        return False


# -- files --------------------------------------------------------------------------------


def write_mode(call: ast.Call, names: Names) -> str:
    """The mode of a call that opens a file for writing ("w", "a", "x", "r+", ...), else ""."""
    called = names.dotted(call.func)
    if called == "logging.FileHandler":
        mode = text_of(argument(call, 1, "mode")) or "a"
        path = argument(call, 0, "filename")
    elif called == "logging.basicConfig":
        path = argument(call, 99, "filename")
        if path is None:
            return ""
        mode = text_of(argument(call, 99, "filemode")) or "a"
    elif called in {"open", "bz2.open", "codecs.open", "gzip.open", "io.open", "lzma.open"}:
        mode = text_of(argument(call, 1, "mode"))
        path = argument(call, 0, "file")
    elif isinstance(call.func, ast.Attribute) and call.func.attr == "open" and called != "os.open":
        mode = text_of(argument(call, 0, "mode"))
        path = call.func.value
        if not re.fullmatch(r"[rwaxbt+]{1,4}", mode):
            return ""
    else:
        return ""
    if path is not None and (text_of(path) in _NOWHERE or names.dotted(path) in _NOWHERE):
        return ""
    return mode if any(letter in mode for letter in "wax+") else ""


def deletes(call: ast.Call, names: Names) -> str:
    """The name of a call that removes, renames or truncates a file by path, else ""."""
    called = names.dotted(call.func)
    if called in _DELETES:
        return called
    if isinstance(call.func, ast.Attribute) and call.func.attr in {"unlink", "rmdir"}:
        return called or f".{call.func.attr}"
    return ""


def saves(call: ast.Call, names: Names) -> str:
    """The name of a call that writes a whole file, else ""."""
    called = names.dotted(call.func)
    if called in _SAVES:
        return called
    if isinstance(call.func, ast.Attribute) and call.func.attr in _SAVE_METHODS and call.args:
        return called or f".{call.func.attr}"
    return ""


def binds(call: ast.Call, names: Names) -> str:
    """The name of a call that takes a network port or socket path, else ""."""
    called = names.dotted(call.func)
    if called in _BINDS:
        return called
    is_bind = isinstance(call.func, ast.Attribute) and call.func.attr == "bind"
    on_a_socket = is_bind and "socket" in names.modules and len(call.args) == 1
    return (called or ".bind") if on_a_socket else ""


def written_handle(call: ast.Call, names: Names) -> Iterator[str]:
    """The names of open files that a call may write into."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in {"write", "writelines"}:
        yield names.dotted(call.func.value)
    called = names.dotted(call.func)
    if called == "print":
        target = argument(call, 99, "file")
        if target is not None:
            yield names.dotted(target)
    if called in {"json.dump", "pickle.dump", "yaml.dump", "torch.save", "csv.writer"}:
        yield from (names.dotted(value) for value in call.args[:2])
