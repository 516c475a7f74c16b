"""What becomes of each JSON Schema keyword: enforced, without a say, or refused.

Tried with llguidance 1.9.1, drafts 4 to 2020-12. By itself it refuses keywords it knows and cannot
enforce, and ignores what it does not know: a misspelt `requried` would be a constraint lost without a
word. Some it takes and does not hold (see `json_schema.py`). So nothing reaches it that is not named
here.
"""

from __future__ import annotations

APPLICATORS = ("allOf", "anyOf", "oneOf", "$ref", "enum", "const")

STRING = frozenset({"minLength", "maxLength", "pattern", "format"})
NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
ARRAY = frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"})
OBJECT = frozenset(
    {
        "properties",
        "patternProperties",
        "additionalProperties",
        "propertyNames",
        "required",
        "minProperties",
        "maxProperties",
    }
)
ENFORCED = frozenset({"type", *APPLICATORS}) | STRING | NUMBER | ARRAY | OBJECT

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

# They say nothing about what is valid. The last ones are OpenAPI's and editors' own; `nullable` would
# allow more than the schema without it, so an answer without null is valid either way.
ANNOTATIONS = frozenset(
    {
        *(
            "title",
            "description",
            "default",
            "examples",
            "example",
            "deprecated",
            "readOnly",
            "writeOnly",
        ),
        *("$comment", "$defs", "definitions", "$anchor", "$schema", "$id", "id", "$vocabulary"),
        *("contentMediaType", "contentEncoding", "contentSchema"),
        *("discriminator", "nullable", "externalDocs", "xml"),
        *("unit", "units", "placeholder", "hint", "label", "widget", "order", "version", "tags"),
        *("propertyOrdering", "markdownDescription", "enumNames", "enumDescriptions", "errorMessage"),
    }
)


def is_foreign(keyword: str) -> bool:
    """Whether it is marked as no keyword: `x-order`, `ui:widget`, `_comment`."""
    return keyword.startswith(("x-", "_")) or ":" in keyword


# The same keyword may be without effect: `uniqueItems: false` is taken.
REFUSED = {
    "not": "say what is wanted instead",
    "disallow": "say what is wanted instead",  # draft 3
    "extends": "write it out",
    "divisibleBy": "use multipleOf",
    "if": "list the alternatives with anyOf",
    "then": "list the alternatives with anyOf",
    "else": "list the alternatives with anyOf",
    "contains": "describe all items with items",
    "minContains": "describe all items with items",
    "maxContains": "describe all items with items",
    "dependentRequired": "list the alternatives with anyOf",
    "dependentSchemas": "list the alternatives with anyOf",
    "dependencies": "list the alternatives with anyOf",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref",
    "$dynamicAnchor": "use $ref and $defs",
    "$recursiveRef": "use $ref",
    "$recursiveAnchor": "use $ref and $defs",
    "x-guidance": "how JSON is written is not the schema's to set",
}

# What llguidance says when it refuses -> the keyword it is about.
COMPLAINTS = (
    ("patternProperty", "patternProperties"),
    ("min/maxProperties", "minProperties"),
    ("multiple of", "multipleOf"),
    ("multipleOf", "multipleOf"),
    ("float range", "minimum"),
    ("integer range", "minimum"),
    ("circular references", "$ref"),
    ("oneOf", "oneOf"),
    ("regex", "pattern"),
)
