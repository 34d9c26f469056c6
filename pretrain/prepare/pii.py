"""Personal data in text: e-mail addresses, telephone numbers, IP addresses and card numbers, found and replaced.

A cheap search finds the candidates, so that ordinary text passes quickly; a check decides on each one (the library
`phonenumbers`, Python's `ipaddress`, the check digit of a card). What is looked for is written in ASCII digits.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator

from pretrain.cli import how_to_install

PLACEHOLDERS = {
    "email": "<EMAIL>",
    "ip_address": "<IP_ADDRESS>",
    "card_number": "<CARD_NUMBER>",
    "phone": "<PHONE>",
}
Span = tuple[int, int]

_LOCAL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-"
_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}\.)+([^\W\d_]{{2,63}})(?![\w@])")
_NOT_DOMAINS = frozenset("png jpg jpeg gif svg webp ico css js".split())  # icon@2x.png

_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_VERSION_BEFORE = re.compile(r"\b(?:v|ver|version|release|revision)[.:=]? ?$", re.IGNORECASE)
_IPV6_PART = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6_CHARS = "0123456789abcdefABCDEF:."
_IPV6_LENGTH = 46  # the longest, and a mark after it

_CARD = re.compile(r"[2-6][0-9]{3}([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|3[0-9]{3}([ -]?)[0-9]{6}\2[0-9]{4,5}")
_DIGITS_BEFORE = re.compile(r"\b[0-9]{4} $")
_DIGITS_AFTER = re.compile(r" [0-9]{4}\b")
_CARD_PREFIXES = (  # lengths, lowest and highest prefix
    ({13, 16, 19}, 4, 4),  # Visa
    ({16}, 51, 55), ({16}, 2221, 2720),  # Mastercard
    ({15}, 34, 34), ({15}, 37, 37),  # American Express
    ({14}, 300, 305), ({14}, 36, 36), ({14}, 38, 39),  # Diners Club
    (set(range(16, 20)), 6011, 6011), (set(range(16, 20)), 644, 659),  # Discover
    (set(range(16, 20)), 3528, 3589),  # JCB
    (set(range(16, 20)), 62, 62),  # UnionPay
    (set(range(13, 20)), 5018, 5018), (set(range(13, 20)), 5020, 5020), (set(range(13, 20)), 5038, 5038),  # Maestro
    (set(range(13, 20)), 5893, 5893), (set(range(13, 20)), 6304, 6304), (set(range(13, 20)), 6759, 6763),
)  # fmt: skip

_INTERNATIONAL = re.compile(r"\+[0-9(][0-9 ().\-/\u00a0\u2011\u2013]{5,}")
_NATIONAL = re.compile(r"[+(]?[0-9][0-9 ().\-/\u00a0\u2011\u2013]{5,}[0-9]")
_PHONE_DIGITS = range(7, 41)  # of a candidate, which may hold a few numbers; more is a table
_EXTENSION = re.compile(r"[ ,;.]{0,3}(?:ext|x|#|int|anexo)\w{0,6}[:. ]{0,3}[0-9]{1,7}", re.IGNORECASE)
_DATE = re.compile(
    r"(?:(?:19|20)[0-9]{2}([-./ ])[01]?[0-9]\1[0-3]?[0-9]|[0-3]?[0-9]([-./ ])[0-3]?[0-9]\2(?:19|20)[0-9]{2})"
    r"(?: [0-2]?[0-9])?"  # and the hour
)
_DECIMAL = re.compile(r"\+?[0-9]+\.[0-9]+")
_INSIDE = re.compile(r"[0-9][.,]$|\w-$")  # after the point of a decimal number, or in a code like aix-6107-1415-32
_INTEGERS = ("2147483646", "2147483647", "2147483648")  # about 2**31: numbers in Texas
_ISBN = re.compile(r"(?:ISBN|ISSN|EAN)(?:-1[03])?:? ?$", re.IGNORECASE)


class Scrubber:
    """Replaces personal data. Without a `region` (like "DE") only telephone numbers that begin with + are known."""

    def __init__(self, region: str | None = None):
        self._phones = PhoneFinder(region)

    def scrub(self, text: str, found: Callable[[str, str, Span], None]) -> str:
        """The text with placeholders; `found(kind, text, span)` for each find, `text` as it is by then."""
        finders = {"email": emails, "ip_address": ip_addresses, "card_number": card_numbers, "phone": self._phones.find}
        for kind, finder in finders.items():
            parts, end = [], 0
            for span in finder(text):
                found(kind, text, span)
                parts += [text[end : span[0]], PLACEHOLDERS[kind]]
                end = span[1]
            if parts:
                text = "".join([*parts, text[end:]])
        return text


def emails(text: str) -> Iterator[Span]:
    """E-mail addresses: a name, @, and a domain that ends in letters."""
    at, end = text.find("@"), 0
    while at >= 0:
        before = text[max(end, at - 64) : at]
        name = before[len(before.rstrip(_LOCAL)) :].lstrip(".-%")
        match = _DOMAIN.match(text, at + 1) if name and not name.endswith(".") else None
        if match and match[1].lower() not in _NOT_DOMAINS:
            end = match.end()
            yield at - len(name), end
        at = text.find("@", at + 1)


def ip_addresses(text: str) -> Iterator[Span]:
    """Addresses of both versions, in order; not a part of a longer dotted number, nor what follows "version"."""
    end = 0
    for span in sorted([*_ipv6(text), *_ipv4(text)]):
        if span[0] >= end:  # an IPv6 address may end in an IPv4 address
            end = span[1]
            yield span


def _ipv4(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        start, end = match.span()
        is_version = _VERSION_BEFORE.search(text[max(0, start - 12) : start])
        if not is_version and not _goes_on(text, start, end, ".") and _is_address(ipaddress.IPv4Address, match[0]):
            yield start, end


def _goes_on(text: str, start: int, end: int, marks: str) -> bool:
    """Whether [start, end) is a part of something: a letter, a digit, _, or a mark and a digit is beside it."""
    before, after = text[max(0, start - 2) : start][::-1], text[end : end + 2]
    return any(
        side[:1].isalnum() or side[:1] == "_" or (side[:1] in marks and side[1:].isdigit()) for side in (before, after)
    )


def _ipv6(text: str) -> Iterator[Span]:
    end = 0
    for match in _IPV6_PART.finditer(text):
        if match.start() < end:
            continue
        before = text[max(end, match.start() - _IPV6_LENGTH) : match.start()]
        after = text[match.end() : match.end() + _IPV6_LENGTH]
        start = match.start() - (len(before) - len(before.rstrip(_IPV6_CHARS)))
        end = match.end() + len(after) - len(after.lstrip(_IPV6_CHARS))
        run = text[start:end].rstrip(".")
        if run.endswith(":") and not run.endswith("::"):
            run = run[:-1]
        if run.startswith(":") and not run.startswith("::"):  # addr:2001:db8::1
            run, start = run[1:], start + 1
        if _looks_like_ipv6(run) and not _goes_on(text, start, start + len(run), ":."):
            if _is_address(ipaddress.IPv6Address, run):
                yield start, start + len(run)


def _looks_like_ipv6(run: str) -> bool:
    """Not std::add, x[10::2] or dead::beef, which the grammar allows."""
    groups = [group for group in run.split(":") if group]
    is_short = len(groups) == 2 and len(groups[0]) == 4 and groups[0][0] in "23fF"
    return len(run) < _IPV6_LENGTH and (is_short or len(groups) > 2) and any(map(str.isdigit, run))


def _is_address(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def card_numbers(text: str) -> Iterator[Span]:
    """Payment cards: 13 to 19 digits, together or in groups, with a prefix of that length and a right check digit."""
    for match in _CARD.finditer(text):
        start, end = match.span()
        digits = match[0].replace(" ", "").replace("-", "")
        # Columns of numbers of four digits are not a card.
        is_table = " " in match[0] and (
            _DIGITS_AFTER.match(text, end) or _DIGITS_BEFORE.search(text[max(0, start - 6) : start])
        )
        if _is_card(digits) and not is_table and not _goes_on(text, start, end, ".,-"):
            yield start, end


def _is_card(digits: str) -> bool:
    is_known = any(
        len(digits) in lengths and low <= int(digits[: len(str(low))]) <= high for lengths, low, high in _CARD_PREFIXES
    )
    return is_known and _has_check_digit(digits)


def _has_check_digit(digits: str) -> bool:
    """Luhn's formula."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[::-2]))) % 10 == 0


class PhoneFinder:
    """Telephone numbers that are valid in the numbering plan of their country."""

    def __init__(self, region: str | None):
        try:
            import phonenumbers
        except ImportError:
            raise ValueError(f"finding telephone numbers needs phonenumbers: {how_to_install('prepare')}") from None
        if region is not None and region not in phonenumbers.SUPPORTED_REGIONS:
            raise ValueError(f"no telephone region {region!r}: give the two letters of a country, like US or DE")
        self._matcher = phonenumbers.PhoneNumberMatcher
        self._region = region
        self._candidate = _NATIONAL if region else _INTERNATIONAL

    def find(self, text: str) -> Iterator[Span]:
        end = 0
        for candidate in self._candidate.finditer(text):
            is_inside = text[candidate.start() - 1 : candidate.start()].isalnum()  # of a hash, a name
            if is_inside or sum(map(str.isdigit, candidate[0])) not in _PHONE_DIGITS:
                continue
            if _is_something_else(text, candidate.start(), candidate[0].strip(" -.")):
                continue
            # The library takes a millisecond for a line of numbers, so it sees no more than it needs: the character
            # before, and after it an extension, or the minutes of what is a time.
            offset = max(0, candidate.start() - 1)
            extension = _EXTENSION.match(text, candidate.end())
            window_end = extension.end() if extension else candidate.end() + 3
            for match in self._matcher(text[offset:window_end], self._region):
                start = offset + match.start
                if end <= start < candidate.end() and not _is_something_else(text, start, match.raw_string):
                    end = offset + match.end
                    yield start, end


def _is_something_else(text: str, start: int, number: str) -> bool:
    """Decimal numbers, dates, parts of a code, numbers of books: some would be valid telephone numbers too."""
    before = text[max(0, start - 10) : start]
    if _DECIMAL.fullmatch(number) or _INSIDE.search(before):
        return True
    if number.startswith("+"):
        return False
    digits = "".join(filter(str.isdigit, number))
    is_isbn = _ISBN.search(before) or (len(digits) == 13 and digits[:3] in ("978", "979"))
    is_integer = number == digits and (before.endswith("-") or digits in _INTEGERS)
    return bool(is_isbn or is_integer or _DATE.fullmatch(number))
