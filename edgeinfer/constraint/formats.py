"""String formats as what an answer is held to.

Those that a regular expression of llguidance describes exactly pass through. Its dates may be the 29th
of February of any year and its times may have 60 seconds, which readers of dates refuse: these are ours.
"""

from __future__ import annotations

_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"  # not 0000
_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
# Gregorian: divisible by 4, centuries by 400.
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_HEX = "[0-9a-f]"

PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    **{
        f"uuid{version}": (
            f"^{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}$"
        )
        for version in range(1, 9)
    },
    **dict.fromkeys(
        ("base64", "byte"), r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
    ),
    "base64url": "^(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?$",
    "json-pointer": "^(?:/[a-zA-Z0-9_.-]*)*$",  # of all pointers, those that need no escapes
}

_SAME = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# The second contains the first: what fits the narrower one is valid.
_NARROWER = {
    "idn-email": "email",
    "idn-hostname": "hostname",
    "iri": "uri",
    "uri-reference": "uri",
    "iri-reference": "uri",
    "uri-template": "uri",
    "url": "uri",
    "ipvanyaddress": "ipv4",
}
NATIVE = {**{name: name for name in _SAME}, **_NARROWER}

# Hints to whoever shows or stores the text; any string has them.
FREE = frozenset({"password", "path", "string", "text", "textarea", "multiline", "binary"})

# OpenAPI's, on numbers: (lowest, highest). None: no bounds beyond what JSON readers hold anyway.
NUMBERS: dict[str, tuple[int, int] | None] = {
    "float": None,
    "double": None,
    "decimal": None,
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32)},
    # below 2^63, and exact as the doubles that llguidance keeps bounds in
    "int64": (-(10**18), 10**18),
    "uint64": (0, 10**18),
}

# Formats of the standard that are not enforced. Others, of nobody's standard, may stand beside a
# pattern, which then is what says what they mean.
STANDARD = frozenset({"regex", "relative-json-pointer"})
