"""What a record is about, and whether an answer kept it: numbers, names, negation, length, language, verdict group, site. Pure.

A record is in every category that fits, so categories overlap. Rules on the reference answer's sentence, the first five and language only
where the answer is in English or Spanish, whose word lists are here (`not_read` says so of other languages):
 * numbers          it has a number: digits not glued to a letter before them ("tank 3", "1.000,5", "9am"; not "soil0321"), or a number word
                    from two up ("one" and "uno" are articles too often). "twenty-five" and "treinta y cinco" are one number, "two
                    hundred" is two. Kept: the answer has the same numbers, as often, in digits or in words.
 * entities         it has a name: a capitalised word inside a sentence (no language, day, month or pronoun), or one that stands in source
                    and reference alike, wherever it is. Kept: each name stands in the answer, letter by letter.
 * negation         it has a word that denies. Kept: so has the answer. (Which word is denied is not looked at.)
 * plain            none of these three.
 * length: short | medium | long      up to 5, up to 12, more words in the reference.
 * language: es     the language of the answer. Kept: the answer has no more function words of another language than of this one.
 * verdicts: power  verdict tasks: the group of the true verdict (GROUPS).
 * site: esteli     the record's site, where it has one.
A rule by word lists errs: a translation may deny by "lack", a name may be translated. Such errors strike every model that is compared
alike; so read the differences between models, and a share "kept" not as a truth about one of them.
"""

import re
from collections import Counter
from collections.abc import Mapping

from coordinator.forge.pairs import language_of
from protocol.tasks import Record, Task

NUMBERS, ENTITIES, NEGATION, PLAIN = "numbers", "entities", "negation", "plain"
SHORT, MEDIUM = 5, 12  # words, at most
GROUPS = {  # verdict code -> what the person on the spot has to look at
    "normal": "normal", "irrigation-due": "soil", "saturated-soil": "soil", "leak": "pipes", "dry-run": "pipes", "clogged-filter": "pipes",
    "valve-stuck": "pipes", "tank-low": "tank", "overflow": "tank", "sensor-stuck": "sensors", "gauge-blocked": "sensors",
    "panel-soiled": "power", "cold-battery": "power", "aged-battery": "power", "gateway-loss": "radio", "radio-weak": "radio",
}  # fmt: skip

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
DIGITS = re.compile(r"(?<!\w)(?<!\d[.,])\d+(?:[.,:]\d+)*")
GROUPED = re.compile(r"\d{1,3}(?:([.,])\d{3})(?:\1\d{3})*(?:[.,]\d{1,2})?")  # 1,000 1.000 12.345,6
SENTENCE_START = re.compile(r"(?:^|[.!?:;¿¡\"“”«»()…\-–—])\s*['‘]?$")

UNITS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "dos": 2, "tres": 3, "cuatro": 4, "cinco": 5,
    "seis": 6, "siete": 7, "ocho": 8, "nueve": 9,
}  # fmt: skip
TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90, "treinta": 30,
    "cuarenta": 40, "cincuenta": 50, "sesenta": 60, "setenta": 70, "ochenta": 80, "noventa": 90,
}  # fmt: skip
ENGLISH_TENS = frozenset(word for word in TENS if word.endswith("ty"))
OTHERS = {  # not "once": eleven in Spanish, one time in English
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18,
    "nineteen": 19, "hundred": 100, "thousand": 1000, "million": 10**6, "diez": 10, "doce": 12, "trece": 13, "catorce": 14,
    "quince": 15, "dieciséis": 16, "diecisiete": 17, "dieciocho": 18, "diecinueve": 19, "veinte": 20, "veintiuno": 21, "veintiún": 21,
    "veintiuna": 21, "veintidós": 22, "veintitrés": 23, "veinticuatro": 24, "veinticinco": 25, "veintiséis": 26, "veintisiete": 27,
    "veintiocho": 28, "veintinueve": 29, "cien": 100, "ciento": 100, "doscientos": 200, "doscientas": 200, "quinientos": 500, "mil": 1000,
    "millón": 10**6, "millones": 10**6,
}  # fmt: skip
ONE = {"one": 1, "uno": 1, "un": 1, "una": 1}  # only after tens
NUMBER_WORDS = {**UNITS, **TENS, **OTHERS}

DENIES = {
    "en": frozenset(("not", "no", "never", "nobody", "nothing", "none", "neither", "nor", "nowhere", "without", "cannot")),
    "es": frozenset(
        ("no", "nunca", "jamás", "nada", "nadie", "ninguno", "ninguna", "ningún", "ningunos", "ningunas", "ni", "tampoco", "sin")
    ),
}
SPEAKS = {  # frequent words of one language that are no words of the other
    "en": frozenset(
        ("the", "is", "are", "was", "were", "and", "of", "to", "in", "that", "it", "you", "she", "they", "we", "for", "with", "this",
         "his", "her", "my", "your", "have", "had", "be", "will", "at", "from", "not", "does", "do", "did", "or", "its", "by", "on")
    ),
    "es": frozenset(
        ("el", "la", "los", "las", "de", "del", "que", "y", "en", "un", "una", "es", "está", "están", "fue", "por", "para", "con", "se",
         "su", "al", "lo", "le", "yo", "tú", "él", "ella", "mi", "tu", "pero", "muy", "más", "hay", "como", "porque", "son", "era", "ha",
         "qué")
    ),
}  # fmt: skip
NOT_NAMES = frozenset(
    ("i", "i'm", "i'd", "i'll", "i've", "mr", "mrs", "ms", "dr", "ok", "tv", "god", "dios", "monday", "tuesday", "wednesday", "thursday",
     "friday", "saturday", "sunday", "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
     "november", "december", "english", "spanish", "french", "german", "italian", "japanese", "chinese", "russian", "portuguese",
     "american", "british", "european", "christmas")
)  # fmt: skip
BOTH_WAYS = frozenset(("no", "he", "has", "me", "once", "sin", "son", "come", "red", "pan", "sea", "are", "a", "real", "final"))


def categories(record: Record, task: Task) -> tuple[str, ...]:
    """The categories of a record with a reference answer, in the order of the rules above."""
    truth, language = task.parse(record.target), language_of(task, record)
    tests = (
        (NUMBERS, bool(numbers(truth.sentence))),
        (ENTITIES, bool(names(truth.sentence, record.source))),
        (NEGATION, denies(truth.sentence, language)),
    )
    content = [name for name, found in tests if found] or [PLAIN]
    count = len(truth.sentence.split())
    size = f"length: {'short' if count <= SHORT else 'medium' if count <= MEDIUM else 'long'}"
    found = [*content, size, f"language: {language}"] if language else [size]
    if truth.verdict:
        found.append(f"verdicts: {GROUPS.get(truth.verdict, truth.verdict)}")
    if record.site:
        found.append(f"site: {record.site}")
    return tuple(found)


def kept(category: str, sentence: str, record: Record, task: Task) -> bool | None:
    """Whether an answer's sentence keeps what makes the record one of `category`; None where the category has no such rule."""
    truth, language = task.parse(record.target).sentence, language_of(task, record)
    if not language:
        return None
    if category == NUMBERS:
        return numbers(sentence) == numbers(truth)
    if category == ENTITIES:
        said = Counter(WORD.findall(sentence))
        return all(said[name] >= count for name, count in Counter(names(truth, record.source)).items())
    if category == NEGATION:
        return denies(sentence, language)
    if category == f"language: {language}":
        return speaks(sentence, language)
    return None


def not_read(task: Task) -> tuple[str, ...]:
    """For the evidence's `not_tested`: what no rule here can tell of the task's answers, because they are in another language."""
    if task.kind != "text" or language_of(task, Record("", task.name, "")):
        return ()
    language = task.name.rpartition("-")[2].capitalize()
    return (
        f"Numbers, names, negation and language of the answers: there are word lists of English and Spanish only, none of {language}, so a "
        "loss in them could hide behind the averages.",
    )


def numbers(text: str) -> Counter[str]:
    """The numbers of a text, each in one spelling ("1000", "2.5", "17:30"), with how often it stands there."""
    found = Counter(_plain(match) for match in DIGITS.findall(text))
    words = [word.lower() for word in WORD.findall(text)]
    place = 0
    while place < len(words):
        word = words[place]
        value, used = NUMBER_WORDS.get(word), 1
        if word in TENS:
            after = words[place + 1 : place + 3]
            skip = 1 if after[:1] == ["y"] else 0
            unit = (UNITS | ONE).get(after[skip]) if len(after) > skip and (skip or word in ENGLISH_TENS) else None
            if unit:
                value, used = TENS[word] + unit, 2 + skip
        if word == "ciento" and words[place - 1 : place] == ["por"]:
            value = None  # per cent
        if value is not None:
            found[str(value)] += 1
        place += used
    return found


def _plain(digits: str) -> str:
    """One spelling of a number: no separators of thousands, a point before decimals, no leading zeros."""
    if GROUPED.fullmatch(digits):
        mark = next(character for character in digits if character in ".,")
        digits = digits.replace(mark, "")
    digits = digits.replace(",", ".")
    return digits.lstrip("0") or "0" if digits.isdigit() else digits


def names(text: str, source: str = "") -> tuple[str, ...]:
    """The capitalised words of `text` that are names by the rules above, in order."""
    elsewhere = frozenset(WORD.findall(source))
    found = []
    for match in WORD.finditer(text):
        word = match.group()
        if not word[0].isupper() or len(word) < 2 or word.lower() in NOT_NAMES:
            continue
        inside = SENTENCE_START.search(text[: match.start()]) is None
        alike = word in elsewhere and word.lower() not in BOTH_WAYS
        if inside or alike:
            found.append(word)
    return tuple(found)


def denies(text: str, language: str) -> bool:
    """Whether a text has a word that denies."""
    words = [word.lower().replace("’", "'") for word in WORD.findall(text)]
    return any(word in DENIES.get(language, frozenset()) or (language == "en" and word.endswith("n't")) for word in words)


def speaks(text: str, language: str) -> bool:
    """Whether a text has words, and no more function words of another language than of `language`."""
    words = [word.lower() for word in WORD.findall(text)]
    count = {name: sum(word in known for word in words) for name, known in SPEAKS.items()}
    return bool(words) and all(other <= count.get(language, 0) for name, other in count.items() if name != language)


def order(categories_: Mapping[str, object]) -> list[str]:
    """Categories as a reader expects them: content, length, language, verdicts, sites."""
    first = [NUMBERS, ENTITIES, NEGATION, PLAIN, "length: short", "length: medium", "length: long"]
    rank = {name: place for place, name in enumerate(first)}
    kinds = ("language", "verdicts", "site")

    def key(name: str) -> tuple[int, str]:
        kind = name.partition(":")[0]
        return rank.get(name, len(first) + (kinds.index(kind) if kind in kinds else len(kinds))), name

    return sorted(categories_, key=key)
