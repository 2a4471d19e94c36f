"""Whether a text follows the verifiable instructions of IFEval (arXiv 2311.07911)."""

import json
import re


def follows(name: str, arguments: dict | None, text: str, prompt: str = "") -> bool | None:
    """Whether `text` follows the instruction `name` ("length_constraints:number_words").

    None where that cannot be checked: the language, without the package langdetect. `arguments` are
    those of the data set, where None stands for absent ones; `prompt` is for instructions that
    repeat it. Raises ValueError for an unknown instruction.
    """
    given = {k: v for k, v in (arguments or {}).items() if v is not None}
    if name == "combination:repeat_prompt":
        wanted = given.get("prompt_to_repeat") or prompt
        return text.strip().lower().startswith(wanted.strip().lower())
    if name not in CHECKS:
        raise ValueError(f"instruction: got {name!r}, expected one of {', '.join(CHECKS)}")
    return bool(text.strip()) and CHECKS[name](text, **given)


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation == "less than":
        return count < wanted
    if relation == "at least":
        return count >= wanted
    raise ValueError(f'relation: got {relation!r}, expected "less than" or "at least"')


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _sentences(text: str) -> int:
    found = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n+", text.strip())
    return sum(re.search(r"\w", sentence) is not None for sentence in found)


def _first_word(text, num_paragraphs, nth_paragraph, first_word):
    found = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    word = re.match(r"\W*([\w'’-]+)", found[nth_paragraph - 1])
    return word is not None and word[1].lower() == first_word.lower()


def _language(text, language):
    try:
        from langdetect import DetectorFactory, detect
    except ImportError:
        return None
    DetectorFactory.seed = 0
    return detect(text) == language


def _postscript(text, postscript_marker="P.S."):
    marker = r"\s*".join(re.escape(c) for c in postscript_marker.replace(" ", ""))
    return re.search(rf"(?m)^\W*{marker}\s*\S", text, re.IGNORECASE) is not None


def _highlights(text, num_highlights):
    double = re.findall(r"\*\*[^*\n]*[^*\s][^*\n]*\*\*", text)
    single = re.findall(r"(?<!\*)\*[^*\n]*[^*\s][^*\n]*\*(?!\*)", text)
    return len(double) + len(single) >= num_highlights


def _json(text):
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _two_responses(text):
    found = [part.strip() for part in text.split("******")]
    return len(found) == 2 and all(found) and found[0] != found[1]


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in re.findall(r"[\w'’-]+", text))


CHECKS = {  # the arguments have the names of the data set
    "keywords:existence": lambda text, keywords: all(_count(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation="at least": _compare(
        _count(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_count(text, word) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation="at least": (
        _compare(text.lower().count(letter.lower()), let_relation, let_frequency)
    ),
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation="at least": (
        _compare(_sentences(text), relation, num_sentences)
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        sum(map(bool, re.split(r"\s*\*\*\*\s*", text.strip()))) == num_paragraphs
    ),
    "length_constraints:number_words": lambda text, num_words, relation="at least": _compare(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"(?m)^\s*(?:\*(?!\*)|-(?!-))\s*\S", text)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(
        f"my answer is {word}" in text.lower() for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"(?m)^\W*{re.escape(section_spliter)}\s*\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text: any(
        title.strip() for title in re.findall(r"<<([^<>\n]+)>>", text)
    ),
    "combination:two_responses": _two_responses,
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').strip().lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: re.fullmatch(r'".*"', text.strip(), re.DOTALL) is not None,
    "change_case:capital_word_frequency": (
        lambda text, capital_frequency, capital_relation="at least": _compare(
            _capital_words(text), capital_relation, capital_frequency
        )
    ),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
