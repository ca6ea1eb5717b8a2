"""What a JSON schema costs llama.cpp, which turns it into a grammar.

Its matches at once, as `samq.llamacpp.grammar_cost` has them:

- Alternatives that begin alike add up: those of `anyOf`, of a list of types, of an enumeration. Objects begin alike if their
  first required property has the same name and the same constant, if any.
- An object has a match for each optional property that may come next, or those of its costliest property.
- A `$ref` has those of its target. If it leads back to itself, they multiply with each of `TURNS` turns.
"""

from collections import Counter
from typing import Any

from samq.llamacpp.grammar_cost import MOST_WORK, TOO_LARGE, TOO_MUCH, TURNS, Cost, UnusableGrammar, pattern_cost


def schema_cost(schema: Any) -> Cost:
    """Of a JSON schema. Raises UnusableGrammar."""
    try:
        return _Schema(schema).cost()
    except RecursionError:
        raise UnusableGrammar("it is nested too deep; shorten it") from None


_Kinds = dict[tuple[str, ...], int]  # matches at once of the values that begin alike
_Visited = tuple[_Kinds, int]  # and the elements
_ANY: _Kinds = {(name,): 1 for name in ("string", "number", "object", "array", "boolean", "null")}


class _Schema:
    """A schema as llama.cpp's common/json-schema.cpp reads it."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._targets = self._find_targets()
        self._kinds: dict[str, _Kinds] = {}  # of the targets, as far as counted
        self._visited: dict[int, _Visited] = {}  # in this turn, by the node's id
        self._work: dict[str, int] = {}  # of each pattern

    def cost(self) -> Cost:
        for _ in range(TURNS):
            before, self._visited = dict(self._kinds), {}
            for ref, target in reversed(self._targets.items()):
                self._kinds[ref] = self._visit(target)[0]
            if self._kinds == before:
                break
        visited = [self._visit(self._root), *map(self._visit, self._targets.values())]
        elements = sum(elements for _, elements in visited)
        return Cost(max(_most(kinds) for kinds, _ in visited), min(TOO_MUCH, elements), sum(self._work.values()))

    def _find_targets(self) -> dict[str, Any]:
        targets: dict[str, Any] = {}
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            if isinstance(node, list):
                waiting += node
            elif isinstance(node, dict):
                waiting += node.values()
                if isinstance(ref := node.get("$ref"), str) and ref not in targets:
                    chain: dict[str, Any] = {}
                    while isinstance(ref, str) and ref not in targets:
                        if ref in chain:
                            raise UnusableGrammar(  # it would end llama-server
                                f"$ref {ref} leads back to itself and to nothing else; point it at a schema that has a type"
                            )
                        target = chain[ref] = self._resolved(ref)
                        ref = target.get("$ref") if isinstance(target, dict) else None
                    targets |= chain
        return targets

    def _resolved(self, ref: str) -> Any:
        node = self._root
        for name in ref.split("/")[1:]:
            if isinstance(node, list):
                node = node[int(name)] if name.isdecimal() and int(name) < len(node) else None
            else:
                node = node.get(name) if isinstance(node, dict) else None
        return node

    def _visit(self, node: Any) -> _Visited:
        if not isinstance(node, dict):
            return _ANY, 1
        if id(node) not in self._visited:
            kinds, elements = self._counted(node)
            self._visited[id(node)] = kinds, min(TOO_MUCH, elements)
        return self._visited[id(node)]

    def _counted(self, node: dict[str, Any]) -> _Visited:
        if "$ref" in node:
            return self._kinds.get(str(node["$ref"]), {}), 1
        if "oneOf" in node or "anyOf" in node:
            return _sum([self._visit(one) for one in _list(node.get("oneOf", node.get("anyOf")))])
        if isinstance(node.get("type"), list):
            return _sum([self._of_type(node, kind) for kind in node["type"]])
        return self._of_type(node, node.get("type"))

    def _of_type(self, node: dict[str, Any], kind: Any) -> _Visited:
        if "const" in node or "enum" in node:
            values = [node["const"]] if "const" in node else _list(node["enum"])
            return {("string",): len(values)}, sum(len(str(value)) for value in values)
        bare = "properties" not in node and node.get("additionalProperties", True) is True
        if kind in (None, "object", "string") and "allOf" in node and (bare or kind == "string"):
            return self._all_of(_list(node["allOf"]))
        if kind == "object" or (kind is None and not bare):
            return self._object(node)
        if kind == "array" or (kind is None and ("items" in node or "prefixItems" in node)):
            items = node.get("items", node.get("prefixItems"))
            visited = [self._visit(item) for item in (items if isinstance(items, list) else [items])]
            elements = sum(elements for _, elements in visited) + 3 * _count(node, "minItems", "maxItems")
            return {("array",): max((_most(kinds) for kinds, _ in visited), default=1)}, elements
        if kind == "string" or (kind is None and {"pattern", "minLength", "maxLength", "format"} & node.keys()):
            if isinstance(pattern := node.get("pattern"), str):
                if pattern not in self._work and sum(self._work.values()) > MOST_WORK:
                    raise UnusableGrammar(TOO_LARGE)
                cost = pattern_cost(pattern)
                self._work[pattern] = cost.work
                return {("string",): cost.matches}, cost.elements
            return {("string",): 1}, 1 + 3 * _count(node, "minLength", "maxLength")
        return (_ANY, 1) if kind is None else ({("number" if kind == "integer" else str(kind),): 1}, 1)

    def _all_of(self, parts: list[Any]) -> _Visited:
        """An object with the properties of all; those of alternatives are optional."""
        visited = [self._visit(part) for part in parts]
        options = [
            one for part in parts if isinstance(part, dict) for one in _list(part.get("oneOf", part.get("anyOf")))
        ]
        targets = [
            self._targets.get(str(one["$ref"])) if "$ref" in one else one for one in options if isinstance(one, dict)
        ]
        optional = sum(len(one.get("properties") or ()) for one in targets if isinstance(one, dict))
        matches = sum(_most(kinds) for kinds, _ in visited) + optional
        return {("object",): min(TOO_MUCH, max(1, matches))}, sum(elements for _, elements in visited)

    def _object(self, node: dict[str, Any]) -> _Visited:
        properties = node.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        names = {name for name in _list(node.get("required")) if isinstance(name, str)}
        required = [name for name in properties if name in names]
        visited = [self._visit(one) for one in (*properties.values(), node.get("additionalProperties"))]
        optional = len(properties) - len(required)
        first = ("object", *required[:1])
        if required and isinstance(value := properties[required[0]], dict):
            first += (repr(value.get("const", value.get("enum", ""))),)
        elements = len(properties) + sum(elements for _, elements in visited)
        return {first: max(1, optional, *(_most(kinds) for kinds, _ in visited))}, elements


def _sum(visited: list[_Visited]) -> _Visited:
    kinds: Counter[tuple[str, ...]] = Counter()
    for one, _ in visited:
        kinds.update(one)
    return {kind: min(TOO_MUCH, count) for kind, count in kinds.items()}, sum(elements for _, elements in visited)


def _most(kinds: _Kinds) -> int:
    return max(kinds.values(), default=1)


def _count(node: dict[str, Any], *names: str) -> int:
    return max((value for name in names if isinstance(value := node.get(name), int)), default=0)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
