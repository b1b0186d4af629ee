"""Expressions that CLDR localises: a value drawn at random, and how Babel writes it in a locale.

Importing this module needs Babel (the extra `corpora`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from random import Random

from babel import Locale
from babel.dates import format_date, format_datetime, format_interval, format_skeleton, format_time, format_timedelta
from babel.lists import format_list
from babel.localedata import locale_identifiers
from babel.numbers import (
    format_compact_decimal,
    format_currency,
    format_decimal,
    format_percent,
    get_currency_precision,
)
from babel.units import format_unit

Render = Callable[[Locale], str]
"""Writes one drawn value in a locale."""

_UNITS_BY_QUANTITY = {
    "area": ("acre", "hectare", "square-kilometer", "square-meter"),
    "digital": ("byte", "gigabyte", "kilobyte", "megabyte", "terabyte"),
    "duration": ("day", "hour", "minute", "month", "second", "week", "year"),
    "energy": ("calorie", "joule", "kilowatt-hour"),
    "frequency": ("hertz",),
    "length": ("centimeter", "foot", "inch", "kilometer", "meter", "mile", "millimeter", "yard"),
    "mass": ("gram", "kilogram", "ounce", "pound", "tonne"),
    "power": ("kilowatt", "megawatt", "watt"),
    "speed": ("kilometer-per-hour", "meter-per-second", "mile-per-hour"),
    "temperature": ("celsius", "fahrenheit"),
    "volume": ("cubic-meter", "gallon", "liter", "milliliter"),
    "electric": ("volt", "ampere"),
    "pressure": ("bar",),
}
UNITS = tuple(f"{quantity}-{unit}" for quantity, units in _UNITS_BY_QUANTITY.items() for unit in units)
"""The units of measure, by their CLDR names."""
# fmt: off
CURRENCIES = (
    "IES", "USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "NZD", "CNY", "INR", "BRL",
    "MXN", "SEK", "NOK", "DKK", "PLN", "CZK", "HUF", "RUB", "TRY", "ZAR", "KRW", "ILS", "THB",
)
# fmt: on
"""The currencies, by their ISO 4217 codes."""

_LONGEST_NAME = 24
_NO_COUNTRY = {"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ"}
_SECONDS = {"seconds": 40, "minutes": 50, "hours": 20, "days": 6, "weeks": 3}
# Date styles with the one first that wins where two are alike in the source: May is both May and May.
_DATE_STYLES = ("long", "full", "medium", "short")


@dataclass(frozen=True)
class Kind:
    """One kind of expression and its share of the corpus."""

    name: str
    weight: int
    draw: Callable[[Random], Sequence[Render]]
    """Returns the chosen way to write a value; then other ways, whose source text it must not share."""


def kinds(source: Locale, target: Locale) -> list[Kind]:
    """Return every kind of which this pair of locales has data, those names left out that have two translations."""
    units = _one_meaning(source, target, [(unit, style) for unit in UNITS for style in ("long", "short")])
    found = [
        Kind("date", 18, _date),
        Kind("month and day", 8, _part_of_date),
        Kind("date and time", 8, _datetime),
        Kind("time", 6, _time),
        Kind("interval", 6, _interval),
        Kind("ago", 4, _ago),
        Kind("number", 5, _number),
        Kind("percent", 4, _percent),
        Kind("amount", 12, _amount),
        *([Kind("unit", 12, partial(_unit, units))] if units else []),
        Kind("compact", 3, _compact),
    ]
    weights = {"countries": 12, "languages": 8, "currencies": 3}
    for kind, codes in _clear_codes(source, target).items():
        if codes:
            found.append(Kind(kind, weights[kind], partial(_list, kind, codes)))
    return found


def _day(rng: Random) -> date:
    return date(1950, 1, 1) + timedelta(days=rng.randrange(36_525))


def _moment(rng: Random) -> time:
    return time(rng.randrange(24), rng.randrange(60), rng.randrange(60))


def _date(rng: Random) -> list[Render]:
    day, chosen = _day(rng), rng.randrange(len(_DATE_STYLES))
    ways: list[Render] = [partial(_format_date, day, style) for style in _DATE_STYLES[: chosen + 1]]
    return ways[::-1]


def _format_date(day: date, style: str, locale: Locale) -> str:
    return format_date(day, style, locale)


def _part_of_date(rng: Random) -> list[Render]:
    day, skeleton = _day(rng), ("MMMMd", "MMMEd", "yMMMM", "yQQQQ")[rng.randrange(4)]
    return [lambda locale: format_skeleton(skeleton, day, locale=locale)]


def _datetime(rng: Random) -> list[Render]:
    moment = datetime.combine(_day(rng), _moment(rng))
    if rng.randrange(2):
        return [lambda locale: format_datetime(moment, "short", locale=locale)]
    return [lambda locale: format_datetime(moment, "medium", locale=locale)]


def _time(rng: Random) -> list[Render]:
    moment = _moment(rng)
    if rng.randrange(3):
        return [lambda locale: format_time(moment, "short", locale=locale)]
    return [lambda locale: format_time(moment, "medium", locale=locale)]


def _interval(rng: Random) -> list[Render]:
    start = _day(rng)
    end = start + timedelta(days=1 + rng.randrange(30))
    return [lambda locale: format_interval(start, end, "yMMMd", locale=locale)]


def _ago(rng: Random) -> list[Render]:
    if rng.randrange(3):
        unit = list(_SECONDS)[rng.randrange(len(_SECONDS))]
        delta = timedelta(**{unit: 1 + rng.randrange(_SECONDS[unit])})
    else:
        delta = timedelta(days=366 * (1 + rng.randrange(60)))
    delta = -delta if rng.randrange(2) else delta
    return [lambda locale: format_timedelta(delta, add_direction=True, locale=locale)]


def _quantity(rng: Random, digits: int = 5, decimals: int = 2) -> Decimal:
    """Draw a number; every count of digits is equally likely."""
    whole = rng.randrange(10 ** (1 + rng.randrange(digits)))
    places = rng.randrange(decimals + 1)
    fraction = Decimal(rng.randrange(10**places)).scaleb(-places)
    # No zeros at the end: plural rules tell 1 from 1.0, and then one text would have two translations.
    return (whole + fraction).normalize() if fraction else Decimal(whole)


def _number(rng: Random) -> list[Render]:
    value = _quantity(rng, digits=8, decimals=3)
    value = -value if rng.randrange(5) == 0 else value
    return [lambda locale: format_decimal(value, locale=locale)]


def _percent(rng: Random) -> list[Render]:
    value = _quantity(rng, digits=3).scaleb(-2)
    return [lambda locale: format_percent(value, locale=locale, decimal_quantization=False)]


def _amount(rng: Random) -> list[Render]:
    currency = CURRENCIES[rng.randrange(len(CURRENCIES))]
    # No more decimals than are written: a plural chosen by what was rounded away cannot be known from the source.
    value = _quantity(rng, digits=6, decimals=get_currency_precision(currency))
    if rng.randrange(2):
        return [lambda locale: format_currency(value, currency, locale=locale)]
    return [lambda locale: format_currency(value, currency, locale=locale, format_type="name")]


def _unit(usable: Sequence[tuple[str, str]], rng: Random) -> list[Render]:
    unit, style = usable[rng.randrange(len(usable))]
    return [partial(_format_unit, _quantity(rng), unit, style)]


def _format_unit(value: Decimal, unit: str, style: str, locale: Locale) -> str:
    text = format_unit(value, unit, style, locale=locale)  # type: ignore[arg-type]
    if unit in text:
        raise LookupError(unit)  # Babel writes the name of the unit itself where a locale lacks it
    return text


def _compact(rng: Random) -> list[Render]:
    # Whole thousands, millions, billions alone: else the source has been rounded and does not tell the target.
    value = (1 + rng.randrange(999)) * 1000 ** (1 + rng.randrange(3))
    return [lambda locale: format_compact_decimal(value, format_type="long", locale=locale)]


def _list(kind: str, codes: Sequence[str], rng: Random) -> list[Render]:
    count = 1 + rng.randrange(min(4, len(codes)))
    chosen = list(dict.fromkeys(codes[rng.randrange(len(codes))] for _ in range(count)))
    style = "or" if rng.randrange(3) == 0 else "standard"
    return [partial(_format_names, kind, chosen, style)]


def _format_names(kind: str, codes: Sequence[str], style: str, locale: Locale) -> str:
    names = _names(kind, locale)
    return format_list([names[code] for code in codes], style, locale)  # type: ignore[arg-type]


def _names(kind: str, locale: Locale) -> Mapping[str, str]:
    return {"countries": locale.territories, "languages": locale.languages, "currencies": locale.currencies}[kind]


def _known_codes(kind: str, locale: Locale) -> list[str]:
    if kind == "countries":
        return [code for code in map(str, locale.territories) if len(code) == 2 and code not in _NO_COUNTRY]
    if kind == "languages":
        return [code for code in locale_identifiers() if len(code) == 2 and code in locale.languages]
    return [code for code in CURRENCIES if code in locale.currencies]


def _clear_codes(source: Locale, target: Locale) -> dict[str, list[str]]:
    """Return the codes with a short name in both locales, those left out whose name has two translations."""
    found: dict[str, list[str]] = {}
    meanings: dict[str, set[str]] = {}
    for kind in ("countries", "languages", "currencies"):
        here, there = _names(kind, source), _names(kind, target)
        codes = [code for code in sorted(_known_codes(kind, source)) if code in there]
        found[kind] = [code for code in codes if len(here[code]) <= _LONGEST_NAME]
        for code in codes:
            meanings.setdefault(here[code], set()).add(there[code])
    return {
        kind: [code for code in codes if len(meanings[_names(kind, source)[code]]) == 1]
        for kind, codes in found.items()
    }


def _one_meaning(source: Locale, target: Locale, options: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the units and styles whose text in the source is that of no other one with another target."""
    written: dict[str, set[str]] = {}
    by_option: dict[tuple[str, str], list[str]] = {}
    for unit, style in options:
        try:
            for value in (Decimal(1), Decimal(2), Decimal(7)):
                text = _format_unit(value, unit, style, source)
                written.setdefault(text, set()).add(_format_unit(value, unit, style, target))
                by_option.setdefault((unit, style), []).append(text)
        except (LookupError, ValueError):
            by_option.pop((unit, style), None)
    return [option for option, texts in by_option.items() if all(len(written[text]) == 1 for text in texts)]
