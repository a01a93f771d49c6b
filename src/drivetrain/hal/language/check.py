"""From the parse to the checked program: declarations, functions, templates, statements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drivetrain.hal.language.convert import constant, convert, decayed
from drivetrain.hal.language.declare import Specifiers, as_parameter, declarator, specifiers
from drivetrain.hal.language.expressions import Reader
from drivetrain.hal.language.scope import (
    Constant,
    Cursor,
    Overloads,
    Scope,
    Template,
    TemplateParam,
    TypeName,
)
from drivetrain.hal.language.statements import Body
from drivetrain.hal.language.syntax import children, line_of, tokens_of
from drivetrain.hal.language.tokens import Token, scan, wrong
from drivetrain.hal.language.tree import Decl, Expr, Function, Program, Ref, Var
from drivetrain.hal.language.types import (
    I32,
    VOID,
    Array,
    Pointer,
    Scalar,
    Struct,
    Type,
    is_scalar,
    named_types,
    shown,
)

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["Header", "Parameter", "Unit"]

MOST_INSTANCES = 2000
"""Of functions: templates can ask for ever more of themselves."""

Bound = tuple[Type | int, ...]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: Type
    reference: bool
    const_reference: bool
    restrict: bool
    const: bool
    default: tuple[Token, ...]
    line: int


@dataclass(frozen=True)
class Header:
    name: str
    params: tuple[Parameter, ...]
    result: Type
    scope: Scope


@dataclass
class Making:
    """The function whose body is being read."""

    function: Function
    temporaries: list[Decl] = field(default_factory=list)


class Unit:
    """One source: its names, and the functions made of it so far.

    ``lenient``: what it cannot read at the top of the file is as if it were not there, for a source
    that another compiler takes and of which only the kernels' headers are asked.
    """

    def __init__(self, root: Node, *, lenient: bool = False) -> None:
        self.scope = Scope()
        for name, kind in named_types().items():
            self.scope.names[name] = TypeName(kind)
        self.program = Program()
        self.templates: list[Template] = []
        self.wanted: list[tuple[Template, Bound]] = []
        self.lenient = lenient
        self._instances: dict[tuple[Template, Bound], Function] = {}
        self._headers: dict[tuple[Template, Bound], Header] = {}
        self._numbers: dict[str, int] = {}
        self._making: list[Making] = []
        for node in children(root):
            self._top(node)

    # -- the top of the file

    def _top(self, node: Node, params: tuple[TemplateParam, ...] | None = None) -> None:
        kind = node.type
        if kind in (";", "expression_statement") and not tokens_of(node)[:-1]:
            return
        if kind == "linkage_specification":
            body = node.child_by_field_name("body")
            if body is not None and body.type == "declaration_list":
                for child in children(body)[1:-1]:
                    self._top(child)
            elif body is not None:
                self._top(body)
            return
        try:
            if kind == "function_definition":
                self._function(node, params)
            elif kind == "template_declaration":
                self._template(node)
            elif kind == "template_instantiation":
                self._instantiation(node)
            elif kind in (
                "declaration", "struct_specifier", "enum_specifier", "type_definition",
                "alias_declaration", "static_assert_declaration", "expression_statement",
            ):  # fmt: skip
                self._declaration(tokens_of(node), node, params)
            elif kind == "using_declaration":
                if (node.text or b"").decode().split() not in (["using", "namespace", "std;"],):
                    raise wrong(line_of(node), "only 'using namespace std' is known")
            else:
                what = kind.replace("_", " ")
                raise wrong(line_of(node), f"{what}: it is not part of the subset")
        except RecursionError:
            raise wrong(line_of(node), "this is nested too deeply") from None
        except Exception:
            if not self.lenient:
                raise

    def _function(self, node: Node, params: tuple[TemplateParam, ...] | None) -> None:
        body = node.child_by_field_name("body")
        tokens = tokens_of(node)
        if body is None:
            raise wrong(line_of(node), "a function without a body")
        inside = body.start_byte - node.start_byte
        header = scan((node.text or b"")[:inside].decode(), line_of(node))
        self._declare_function(tuple(header), body, params, tokens[0].line)

    def _declare_function(
        self,
        header: tuple[Token, ...],
        body: Node | None,
        params: tuple[TemplateParam, ...] | None,
        line: int,
    ) -> None:
        words = [token.text for token in header]
        kernel = "__global__" in words
        special: tuple[Token, ...] | None = None
        bounds: tuple[Token, ...] = ()
        if "__launch_bounds__" in words:
            cursor = Cursor(list(header[words.index("__launch_bounds__") + 1 :]), line)
            inside = cursor.balanced()
            cut = [token.text for token in inside].index(",") if "," in inside_texts(inside) else -1
            bounds = tuple(inside[:cut] if cut >= 0 else inside)
        name = _function_name(header, line)
        if params == ():
            special = _special_arguments(header, line)
            params = ()
        if name.startswith("operator"):
            raise wrong(line, "operators of the user's own are not part of the subset")
        if not {"__device__", "__global__", "constexpr"} & set(words):
            return  # a function of the host's
        known = self.scope.names.get(name)
        if known is None:
            known = Overloads()
            self.scope.names[name] = known
        if not isinstance(known, Overloads):
            raise wrong(line, f"{name!r} is declared twice")
        template = Template(
            name, line, header, body, params or (), kernel, bounds, special
        )  # fmt: skip
        if body is not None:
            self._replace_declaration(known, template)
            self.templates.append(template)
        else:
            known.templates.append(template)

    def _replace_declaration(self, known: Overloads, template: Template) -> None:
        """A body takes the place of the declaration that went before it."""
        if not template.params and template.special is None:
            kinds = self._kinds(template)
            for position, other in enumerate(known.templates):
                if other.params or other.special is not None or self._kinds(other) != kinds:
                    continue
                if other.body is not None:
                    raise wrong(template.line, f"the function {template.name} is written twice")
                other.body, other.header = template.body, template.header
                known.templates[position] = other
                # The earlier object stays the one that calls refer to.
                template.body = None
                self.templates.append(other)
                return
        known.templates.append(template)

    def _kinds(self, template: Template) -> list[Type]:
        try:
            return [parameter.type for parameter in self.header(template, ()).params]
        except Exception:
            if self.lenient:
                return []
            raise

    def _template(self, node: Node) -> None:
        params_node = node.child_by_field_name("parameters")
        inner = children(node)[-1]
        assert params_node is not None
        if inner.type == ";":
            inner = children(node)[-2]
        tokens = tokens_of(params_node)[1:-1]
        params = self._template_params(tokens, line_of(node))
        if inner.type in ("function_definition", "declaration"):
            self._top(inner, params)
            return
        raise wrong(line_of(node), "only functions can be templates")

    def _template_params(self, tokens: list[Token], line: int) -> tuple[TemplateParam, ...]:
        cursor = Cursor(tokens, line)
        out: list[TemplateParam] = []
        while not cursor.done:
            kind: Type | None = None
            if cursor.peek() in ("typename", "class"):
                cursor.take()
                if cursor.peek() == "...":
                    raise wrong(cursor.line, "templates of any length are not part of the subset")
                name = cursor.name().text
            else:
                item = declarator(
                    cursor, specifiers(cursor, self.scope, self.constant_of), self.scope,
                    self.constant_of,
                )  # fmt: skip
                kind, name = item.type, item.name
                if not isinstance(kind, Scalar) or kind.kind not in ("int", "uint", "bool"):
                    raise wrong(item.line, "a template's parameter is a type or a whole number")
            default: list[Token] = []
            if cursor.skip("="):
                while not cursor.done and cursor.peek() != ",":
                    default.append(cursor.take())
            out.append(TemplateParam(name, kind is None, tuple(default), kind))
            if not cursor.skip(","):
                break
        cursor.finish("the template's parameters")
        return tuple(out)

    def _instantiation(self, node: Node) -> None:
        tokens = tokens_of(node)
        cursor = Cursor(tokens, line_of(node))
        while not cursor.done and not (
            isinstance(self.scope.find(cursor.peek()), Overloads) and cursor.peek(1) in ("<", "(")
        ):
            cursor.take()
        if cursor.done:
            raise wrong(line_of(node), "this template is not known")
        name = cursor.take().text
        if cursor.peek() != "<":
            raise wrong(line_of(node), f"write the arguments: {name}<...>")
        explicit = Reader(cursor, self.scope, self).template_arguments()
        self.request(name, explicit, line_of(node))

    def request(self, name: str, explicit: list[Type | int], line: int) -> None:
        """Note that an instance of a template kernel is wanted."""
        symbol = self.scope.find(name)
        if isinstance(symbol, Overloads):
            for template in symbol.templates:
                if template.body is None or len(explicit) > len(template.params):
                    continue
                bound = self.deduce(template, explicit, None, line)
                if bound is not None:
                    if (template, bound) not in self.wanted:
                        self.wanted.append((template, bound))
                    return
        raise wrong(line, f"no template {name} takes these arguments")

    # -- declarations at the top

    def _declaration(
        self, tokens: list[Token], node: Node, params: tuple[TemplateParam, ...] | None
    ) -> None:
        line = line_of(node)
        cursor = Cursor(tokens, line)
        if declares_alias(cursor, self.scope, self):
            return
        words = [token.text for token in tokens]
        for_device = params is not None or {"__device__", "__global__"} & set(words)
        if for_device and words[-2:] == [")", ";"] and not {"{", "="} & set(words):
            self._declare_function(tuple(tokens[:-1]), None, params, line)
            return
        if params is not None:
            raise wrong(line, "only functions can be templates")
        parts = specifiers(cursor, self.scope, self.constant_of)
        if cursor.done or cursor.skip(";"):
            return
        while True:
            item = declarator(cursor, parts, self.scope, self.constant_of)
            if cursor.peek() == "(":
                return  # a function of the host's
            self._global(item.name, item.type, item.const, item.reference, parts, cursor)
            if not cursor.skip(","):
                break
        cursor.expect(";")

    def _global(
        self,
        name: str,
        kind: Type | None,
        const: bool,
        reference: bool,
        parts: Specifiers,
        cursor: Cursor,
    ) -> None:
        line = cursor.line
        if "typedef" in parts.flags:
            assert kind is not None
            if isinstance(kind, Struct) and not kind.name:
                kind.name = name
            self.scope.add(name, TypeName(kind), line)
            return
        if reference:
            raise wrong(line, f"{name} is a reference at the top of the file")
        init: Expr | None = None
        if cursor.skip("=") or cursor.peek() == "{":
            init = Reader(cursor, self.scope, self).initializer(kind or I32)
            if kind is None or (isinstance(kind, Array) and kind.count < 0):
                kind = init.type
            init = convert(init, kind)
        constant_memory = "constant" in parts.flags
        if not const and not constant_memory:
            if "device" in parts.flags or "shared" in parts.flags:
                raise wrong(
                    line, f"{name} is a variable of the whole program: pass a pointer instead"
                )
            return  # the host's
        if init is None:
            if "extern" not in parts.flags and not constant_memory:
                raise wrong(line, f"the constant {name} has no value")
            raise wrong(
                line,
                f"__constant__ {name} has no value here and cannot be set from outside: pass a "
                "pointer, or give it values",
            )
        assert kind is not None
        var = Var(name, kind, line, role="const", const=True, init=init)
        if isinstance(kind, Pointer):
            raise wrong(line, f"the constant {name} is a pointer")
        self._must_be_constant(init, name)
        self.scope.add(name, var, line)
        if not is_scalar(kind):
            self.program.constants.append(var)

    def _must_be_constant(self, init: Expr, name: str) -> None:
        from drivetrain.hal.language.tree import Construct, Intrinsic

        if isinstance(init, Construct):
            for part in init.parts:
                self._must_be_constant(part, name)
            return
        if isinstance(init, Intrinsic) and init.name.endswith(("as_float", "as_double")):
            return
        if constant(init) is None:
            raise wrong(init.line, f"the value of {name} is not known when it is compiled")

    def constant_of(self, tokens: list[Token], scope: Scope) -> int:
        """A constant expression that is a whole number."""
        line = tokens[0].line if tokens else 0
        cursor = Cursor(list(tokens), line)
        value = constant(Reader(cursor, scope, self).conditional())
        cursor.finish("this constant")
        if not isinstance(value, int):
            raise wrong(line, "this must be a whole number that is known when it is compiled")
        return value

    # -- functions

    def header(self, template: Template, bound: Bound) -> Header:
        """The signature with the template's parameters filled in."""
        key = (template, bound)
        if key not in self._headers:
            self._headers[key] = self._read_header(template, bound)
        return self._headers[key]

    def _read_header(self, template: Template, bound: Bound) -> Header:
        scope = Scope(self.scope)
        for param, value in zip(template.params, bound, strict=True):
            if isinstance(value, int):
                scope.names[param.name] = Constant(param.kind or I32, value)
            else:
                scope.names[param.name] = TypeName(value)
        cursor = Cursor(list(template.header), template.line)
        parts = specifiers(cursor, scope, self.constant_of)
        if cursor.peek() == "__launch_bounds__":
            cursor.take()
            cursor.balanced()
        made = declarator(cursor, parts, scope, self.constant_of)
        if made.type is None:
            raise wrong(template.line, f"{template.name} returns auto: write the type")
        if made.reference:
            raise wrong(template.line, f"{template.name} returns a reference: return a pointer")
        if isinstance(made.type, Array):
            raise wrong(template.line, f"{template.name} returns an array")
        if template.special is not None:
            Reader(cursor, scope, self).template_arguments()
        params: list[Parameter] = []
        inside = Cursor(cursor.balanced(), template.line)
        if [token.text for token in inside.tokens] == ["void"]:
            inside.tokens = []
        while not inside.done:
            if inside.peek() == "...":
                raise wrong(inside.line, "functions with any number of arguments are refused")
            item = declarator(
                inside, specifiers(inside, scope, self.constant_of), scope, self.constant_of,
                nameless=True,
            )  # fmt: skip
            kind = as_parameter(item)
            default: list[Token] = []
            if inside.skip("="):
                depth = 0
                while not inside.done and not (inside.peek() == "," and depth == 0):
                    depth += (inside.peek() in ("(", "{")) - (inside.peek() in (")", "}"))
                    default.append(inside.take())
            if template.kernel and item.reference:
                raise wrong(item.line, f"the kernel's parameter {item.name} is a reference")
            params.append(
                Parameter(
                    item.name, kind, item.reference, item.reference and item.const,
                    item.restrict, item.const and not item.reference, tuple(default), item.line,
                )
            )  # fmt: skip
            if not inside.skip(","):
                break
        inside.finish(f"the parameters of {template.name}")
        if template.kernel and made.type != VOID:
            raise wrong(template.line, f"the kernel {template.name} returns a value")
        return Header(template.name, tuple(params), made.type, scope)

    def deduce(
        self,
        template: Template,
        explicit: list[Type | int] | None,
        arguments: list[Expr] | None,
        line: int,
    ) -> Bound | None:
        """The template's arguments for a call; None when it does not fit."""
        if template.special is not None:
            cursor = Cursor(list(template.special), template.line)
            wanted = Reader(cursor, self.scope, self).template_arguments()
            return () if explicit is None or explicit == wanted else None
        if not template.params:
            return () if not explicit else None
        given: dict[str, Type | int] = {}
        for param, value in zip(template.params, explicit or [], strict=False):
            if isinstance(value, int) == param.is_type:
                return None
            given[param.name] = value
        if len(explicit or []) > len(template.params):
            return None
        marks = {
            param.name: Struct(f"<{param.name}>") for param in template.params if param.is_type
        }
        pattern = self.header(
            template, tuple(marks[p.name] if p.is_type else 1 for p in template.params)
        )
        for parameter, argument in zip(pattern.params, arguments or [], strict=False):
            kind = argument.type if parameter.reference else decayed_type(argument)
            _unify(parameter.type, kind, {id(mark): name for name, mark in marks.items()}, given)
        scope = Scope(self.scope)
        out: list[Type | int] = []
        for param in template.params:
            if param.name not in given:
                if not param.default:
                    return None
                given[param.name] = self._default(param, scope)
            value = given[param.name]
            scope.names[param.name] = (
                Constant(param.kind or I32, value) if isinstance(value, int) else TypeName(value)
            )
            out.append(value)
        return tuple(out)

    def _default(self, param: TemplateParam, scope: Scope) -> Type | int:
        from drivetrain.hal.language.declare import type_name

        cursor = Cursor(list(param.default), 0)
        if param.is_type:
            return type_name(cursor, scope, self.constant_of)
        return self.constant_of(list(param.default), scope)

    def instance(self, template: Template, bound: Bound, line: int) -> Function:
        """The function with the template's parameters filled in, its body checked."""
        key = (template, bound)
        if key in self._instances:
            return self._instances[key]
        if template.body is None:
            raise wrong(line, f"the function {template.name} has no body in this source")
        if len(self._instances) >= MOST_INSTANCES or len(self._making) > 60:
            raise wrong(line, f"{template.name}: too many functions come of the templates")
        header = self.header(template, bound)
        scope = Scope(header.scope)
        params: list[Var] = []
        for parameter in header.params:
            kind = parameter.type
            if parameter.reference:
                kind = Pointer(kind, parameter.const_reference)
            if kind == VOID or (isinstance(kind, Struct) and not kind.complete):
                raise wrong(parameter.line, f"the parameter {parameter.name} has no complete type")
            var = Var(
                parameter.name or "unused", kind, parameter.line, role="param",
                const=parameter.const, restrict=parameter.restrict,
                reference=parameter.reference,
            )  # fmt: skip
            params.append(var)
            if parameter.name:
                scope.add(parameter.name, var, parameter.line)
        number = self._numbers.get(template.name, 0)
        self._numbers[template.name] = number + 1
        function = Function(
            template.name, template.line, params, header.result, kernel=template.kernel,
            number=number,
        )  # fmt: skip
        if template.launch_bounds:
            function.launch_bounds = self.constant_of(list(template.launch_bounds), scope)
        shown_arguments = ",".join(
            str(value) if isinstance(value, int) else shown(value) for value in bound
        )
        function.user_name = template.name + (f"<{shown_arguments}>" if template.params else "")
        self._instances[key] = function
        making = Making(function)
        self._making.append(making)
        try:
            body = Body(self, scope, header.result, kernel=template.kernel).read(template.body)
        except RecursionError:
            raise wrong(template.line, f"{template.name} is nested too deeply") from None
        self._making.pop()
        body.body[:0] = making.temporaries
        function.body = body
        if not template.kernel:
            self.program.functions.append(function)
        return function

    def temporary(self, kind: Type, line: int) -> Expr:
        """A place for a value, declared at the start of the function that is being read."""
        var = Var("value", kind, line)
        self._making[-1].temporaries.append(Decl(line, var))
        return Ref(kind, line, var)

    def default_argument(self, function: Function, position: int, line: int) -> Expr:
        for (template, bound), made in self._instances.items():
            if made is function:
                parameter = self.header(template, bound).params[position]
                cursor = Cursor(list(parameter.default), line)
                return Reader(cursor, self.scope, self).assignment()
        raise wrong(line, f"{function.name} needs more arguments")

    # -- all that is asked for

    def build(self) -> Program:
        """Check every function. Kernels that are templates are made when they were asked for."""
        for template in list(self.templates):
            if template.params or template.body is None:
                continue
            bound: Bound = ()
            if template.kernel:
                self._kernel(template, bound)
            elif template.special is None:
                self.instance(template, bound, template.line)
        for template, bound in self.wanted:
            self._kernel(template, bound)
        return self.program

    def _kernel(self, template: Template, bound: Bound) -> None:
        function = self.instance(template, bound, template.line)
        if function.user_name in self.program.kernels:
            if self.program.kernels[function.user_name] is not function:
                raise wrong(template.line, f"the kernel {function.user_name} is written twice")
            return
        self.program.kernels[function.user_name] = function


def inside_texts(tokens: list[Token]) -> list[str]:
    return [token.text for token in tokens]


def decayed_type(argument: Expr) -> Type:
    return decayed(argument).type if isinstance(argument.type, Array) else argument.type


def _unify(pattern: Type, kind: Type, marks: dict[int, str], given: dict[str, Type | int]) -> None:
    """Note what a template's types must be for an argument to fit."""
    if isinstance(pattern, Struct) and id(pattern) in marks:
        given.setdefault(marks[id(pattern)], kind)
    elif isinstance(pattern, Pointer) and isinstance(kind, Pointer):
        _unify(pattern.to, kind.to, marks, given)
    elif isinstance(pattern, Array) and isinstance(kind, Array):
        _unify(pattern.of, kind.of, marks, given)


def _function_name(header: tuple[Token, ...], line: int) -> str:
    depth = 0
    for position, token in enumerate(header):
        if token.text == "(" and depth == 0 and position:
            before = header[position - 1]
            if before.text in ("__launch_bounds__", "__align__", "__attribute__", "alignas"):
                depth += 1
                continue
            if before.text in (">", ">>"):
                level = 0
                for back in range(position - 1, 0, -1):
                    level += {">": 1, ">>": 2, "<": -1}.get(header[back].text, 0)
                    if level == 0:
                        return header[back - 1].text
            if before.kind != "name":
                if position > 1 and header[position - 2].text == "operator":
                    return "operator"
                raise wrong(line, "the name of this function cannot be read")
            return before.text
        depth += (token.text == "(") - (token.text == ")")
    raise wrong(line, "a function without parameters in brackets")


def _special_arguments(header: tuple[Token, ...], line: int) -> tuple[Token, ...]:
    name = _function_name(header, line)
    texts = [token.text for token in header]
    start = texts.index(name) + 1
    if texts[start] != "<":
        raise wrong(line, f"template <> needs {name}<...>")
    end = start
    level = 0
    while True:
        level += {">": -1, ">>": -2, "<": 1}.get(texts[end], 0)
        end += 1
        if level == 0:
            return header[start:end]


def declares_alias(cursor: Cursor, scope: Scope, unit: Unit) -> bool:
    """``using T = ...``, ``static_assert(...)``: read here when they are one."""
    from drivetrain.hal.language.declare import type_name

    line = cursor.line
    if cursor.peek() == "using":
        cursor.take()
        name = cursor.name().text
        cursor.expect("=")
        scope.add(name, TypeName(type_name(cursor, scope, unit.constant_of)), line)
        cursor.expect(";")
        return True
    if cursor.peek() in ("static_assert", "_Static_assert"):
        cursor.take()
        inside = cursor.balanced()
        texts = inside_texts(inside)
        commas = [at for at, token in enumerate(inside) if token.kind == "string"]
        condition = inside[: commas[0] - 1] if commas else inside
        if not unit.constant_of(condition, scope):
            message = texts[commas[0]] if commas else ""
            raise wrong(line, f"static_assert failed {message}".strip())
        return True
    return False
