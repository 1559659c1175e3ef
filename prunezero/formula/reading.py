"""Text from outside becomes an expression through a whitelist, and is never evaluated.

Python's own parser makes a syntax tree of it; of that tree we accept names of features, numbers,
`+ - * / **`, and calls of operators by name. Everything else is refused, whatever it means.
(`sympy.sympify` and `parse_expr` evaluate code, so no text ever reaches them.)
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

from prunezero.errors import CriterionError, did_you_mean
from prunezero.formula.canonical import combine, feature_symbol
from prunezero.formula.constants import MAX_CONSTANT, number
from prunezero.formula.features import FEATURES
from prunezero.formula.vocabulary import OPERATORS, current_word

MAX_LENGTH = 512
MAX_DEPTH = 16
MAX_NODES = 96

_INFIX: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Pow: "power",
}


def read(text: str) -> Any:
    """The expression that a formula's text stands for, not yet canonical.

    Raises:
        CriterionError: the text is too long or too deep, or holds anything but the vocabulary.
    """
    tree = _syntax_tree(text)
    _check_size(tree)
    return _expression(tree, MAX_DEPTH)


def check_readable(text: str) -> None:
    """Refuse a formula that was built, not read, when its own text would be refused by `read`.

    Raises:
        CriterionError: the text is too long or too deep.
    """
    tree = _syntax_tree(text)
    _check_size(tree)
    if _depth(tree) > MAX_DEPTH:
        raise _too_deep()


def _check_size(tree: ast.expr) -> None:
    if sum(isinstance(node, ast.expr) for node in ast.walk(tree)) > MAX_NODES:
        raise CriterionError(f"a formula may have at most {MAX_NODES} words")


def _depth(tree: ast.AST) -> int:
    inside = [node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.expr)]
    if isinstance(tree, ast.Call):
        # The name of an operator is no level of its own.
        inside = tree.args
    return 1 + max(map(_depth, inside), default=0)


def _too_deep() -> CriterionError:
    return CriterionError(f"a formula may be nested at most {MAX_DEPTH} deep")


def _syntax_tree(text: str) -> ast.expr:
    if not isinstance(text, str) or not text.strip():
        raise CriterionError("a formula is empty; write one such as abs(W) * X")
    if len(text) > MAX_LENGTH:
        raise CriterionError(f"a formula has {len(text)} characters; at most {MAX_LENGTH} are read")
    if not text.isascii() or not text.replace("\n", " ").isprintable():
        raise CriterionError("a formula may hold plain ASCII characters only")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise CriterionError(f"'{_shortened(text)}' is not a formula that can be read") from error


def _expression(node: ast.expr, depth: int) -> Any:
    if depth == 0:
        raise _too_deep()
    match node:
        case ast.Name(id=name):
            return feature_symbol(name)
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _constant(value)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _expression(operand, depth - 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return combine(OPERATORS["neg"], _expression(operand, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _INFIX:
            operator = OPERATORS[_INFIX[type(op)]]
            return combine(operator, _expression(left, depth - 1), _expression(right, depth - 1))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _call(name, arguments, depth)
    raise CriterionError(
        f"'{_shortened(ast.unparse(node))}' is not allowed in a formula; use features, numbers, "
        "+ - * / ** and the operators of `prunezero list operators`"
    )


def _call(name: str, arguments: list[ast.expr], depth: int) -> Any:
    name = current_word(name)
    operator = OPERATORS.get(name)
    if name in FEATURES:
        raise CriterionError(
            f"'{name}' is a feature and takes no values; to multiply, write {name} * (...)"
        )
    if operator is None:
        near = did_you_mean(name, [*OPERATORS, *FEATURES]) or "."
        raise CriterionError(
            f"'{name}' is not a known operator{near} Known operators: {', '.join(OPERATORS)}."
        )
    if len(arguments) != operator.arity:
        raise CriterionError(
            f"{name} takes {operator.arity} value(s), not {len(arguments)}: {operator.usage}"
        )
    return combine(operator, *(_expression(argument, depth - 1) for argument in arguments))


def _constant(value: int | float) -> Any:
    # Written so that NaN is refused, and an integer too large for a float is never made one.
    if not abs(value) < MAX_CONSTANT:
        raise CriterionError(f"a constant is too large; it must be below {MAX_CONSTANT:g}")
    return number(value)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
