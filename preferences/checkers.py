"""Decide by program whether a response obeys a preference.

Every checker is a pure function `(response, **parameters) -> bool`. They judge the text of any model, so they look
through what models wrap around an answer: code fences, JSON, headings, list markers, emphasis, blank lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

__all__ = ["CHECKERS", "prose"]

_STRAIGHT = str.maketrans("’‘ʼ´", "''''")  # the expressions below know only one apostrophe
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“”", "‘": "’", "'": "'", "‹": "›", "”": "”", "»": "«", "「": "」"}
_TITLE = ("title", "heading")  # keys under which JSON has a title
_EASY = """sometimes something everything everybody everywhere different beautiful wonderful important butterfly
    butterflies caterpillar chocolate dinosaur dinosaurs grandmother""".split()  # long words that children know
_ASIDE = """a an the is are was what who how why when where which do does did i me my you your we it of to in on for
    about tell can could would should please explain give know""".split()  # no topic of a question
_MACROS = {
    "<start>": r"(?:^|[.!?…:;] )[^\w\n]{0,6}",  # of a sentence or a line
    "<aside>": r"\A(?:\W*(?:(?:[\w'-]+ ){0,3}[\w'-]+[,!:]+\s|(?:[\w'-]+ )?[\w'-]+\.\s)){0,3}\W*",  # Anna, arr! …
    "<expert>": "an? (?:\\w+ )?(?:professional|electrician|doctor|physician|expert|vet|specialist|lawyer|adviser)",
    "<emoji>": "\U0001f004\U0001f0cf\U0001f170-\U0001f251\U0001f300-\U0001faff⌚⌛⏩-⏳☀-☄☔☕☘☠-☣☮☯☸-☺♈-♓♥♨♻♿⚒-⚗⚙-⚜"
    "⚠⚡⚪⚫⚽⚾⛄⛅⛈⛎⛔⛩-⛵⛷-⛺⛽✂✅✈-✍✨❄❌❎❓-❕❗❣❤➕-➗➰➿⬛⬜⭐⭕",
    "<number>": r"(?<!\d)(?<!\d[,.])(?<![$£€])(?!(?-i:\dG\b))[\d½¼¾][\d,.]{0,20}[\s-]{0,3}"
    r"(?:(?:hundred|thousand|million|billion|degrees?|square|cubic)\s+){0,3}",
    "<many>": r"\b(?:two|three|four|five|six|seven|eight|nine|ten|hundreds?|thousands?|millions?|few|an?|of)[\s-]",
}


def _table(text: str) -> dict[str, re.Pattern[str]]:
    """Read expressions, `name ~ anything` or `name = whole words`, in any case; an indented line goes on."""
    found = {}
    for entry in re.split(r"\n(?=\w)", text.strip()):
        name, kind, expression = entry.split(" ", 2)
        expression = "".join(line.strip(" ") for line in expression.splitlines())
        for macro, meaning in _MACROS.items():
            expression = expression.replace(macro, meaning)
        found[name] = re.compile(rf"\b(?:{expression})\b" if kind == "=" else expression, re.I | re.M)
    return found


_SHAPE = _table(r"""
fence ~ \s*(`{3,}|~{3,})\s*([\w+.#-]*)\s*$
bullet ~ ^[ \t>]*(?:[-*+–—][ \t\xa0]+|[•◦‣▪▫●○·∙⁃➤►▸✓✔✅☑]\ufe0f?\s*)(?=.*\w)
number ~ ^[ \t>]*(?:#{1,6} )?(?:\*\*|__)?(?:(?:(?:step|fact|point) )?\(?\d{1,3}\\?[.):](?:\*\*|__)?[ \t\xa0]+|
    \d\ufe0f?\u20e3\s*|[①-⑳]\s*)(?=.*\w)
heading ~ \s*(?:#{1,6}\s+\S.*|(\*\*|__)(?![\s*_])[^*\n]{0,80}?[^*.!…,]\1:?\s*|<h[1-6]>.*|(?:title|heading)\s*:.*)
bold ~ (?<!\\)\*\*(?=[^\s*])(?:[^*\n]|\*(?!\*))*?(?<=\S)\*\*|(?<!\w)__(?=[^\s_])(?:[^_\n]|_(?!_))*?(?<=\S)__(?!\w)|<(b|
    strong)>.{1,300}?</\1>|[\U0001d400-\U0001d433\U0001d5d4-\U0001d607]
emphasis ~ \*\*+|(?<!\w)[*_]+(?=\S)|(?<=[^\s*_])[*_]+(?!\w)|~~|`|</?(?:b|strong|i|em|u|br|p|h[1-6])\s?/?>
emoji ~ [<emoji>]|[\u00a9\u00ae\u203c-\u3299]\ufe0f|[0-9#*]\ufe0f?\u20e3
trailer ~ (?:\s|#\w+|[<emoji>\u2600-\u27bf\ufe0f\u200d])+\Z
stop ~ (?<![.!?…])[.!?…؟।]+(?:["'”’»)\]*_~]|\[\d+\])*(?=\s|\Z|[<emoji>])|[。！？]+[」』”]*
abbreviation ~ \b(?:(?:approx|diam|ca|cf|e\.g|i\.e|etc|vs|fig|dr|mrs?|ms|mt|prof|st|jr|no(?=\. \d))\.(?=\s+\S)|
    [a-z]\.(?: [a-z]\.)+(?= \S)|(?:[a-z]\.){2,5}(?= (?-i:[a-z0-9(])))
word ~ [^\W\d_]+(?:['’][^\W\d_]+)*
label ~ \W*(?:(?:final|short|my|the) )?(?:answer|response|reply|a)(?:\W{0,3}:|\s+[-–—]\s)
hashtag ~ (?<![\w&/#])#(?:[^\W\d_]|\d+[^\W\d_]{3})\w*
shout ~ (?<!<)[!！‼❗](?![=\[])
metric ~ (?:<number>(?:(?:kilo|centi|milli)?(?:met(?:re|er)|gram|lit(?:re|er))s?|[kcmnµμ]?m|[kmµ]?g|[mcd]?l|km/?h|
    tonnes?|celsius|[°º]\s*c)|<many>(?:(?:kilo|centi|milli)met(?:re|er)s?|metres?|grams?|lit(?:re|er)s?))(?![^\W\d_²³])
imperial ~ (?:<number>(?:miles?|mph|feet|foot|ft|inch(?:es)?|pounds?|lbs?|ounces?|(?:fl\.? )?oz|gallons?|pints?|yards?|
    acres?|fahrenheit|[°º]\s*f|'\s?\d{1,2}\s?["″”])|<many>(?:miles?|inch(?:es)?|ounces?|gallons?|acres?))(?![^\W\d_²³])
""")
_SAID = _table(r"""
i ~ \b(?-i:I|i|[Mm](?:y|e|yself)|M(?:Y|E|YSELF))\b|\b(?:of|is|are) mine\b
we ~ \b(?-i:[Ww]e|[Oo]urs?|[Uu]s|[Oo]urselves|WE|OURS?|OURSELVES|[Ll]et's|LET'S)\b
you = you|yours?|yourself|yourselves|y'all
idiom = thank you|yours(?=, (?:the|your)\b| truly| sincerely)|my (?=dear|friend|little one|darling)|i(?=\.e\.|/o)|
    (?:war|type|class|phase|part) i(?= )|(?:ask|let|tell|permit|allow|trust) me|by my \w+ (?:wand|beard|staff)
pirate = ar{2,}g*h?|yar+g*h?|ahoy|avast|mateys?|ye|yer|(?:me|my) (?:\w+ )?hearty|hearties|landlubbers?|yo[- ]ho|
    sc[au]ll[ay]wags?|shiver me timbers|aye(?=[,.!…]| aye)
friendly ~ !|[😀-🙏🤗🥰☺❤]|\b(?:my (?:dear )?friends?|dear friends?|hello|hey|welcome|i hope|feel free|(?:sure|of course
    |dear \w+)(?=,)|happy (?:to|that|you)|(?:great|good|lovely|wonderful) question|(?:how|what an?) (?:lovely|wonderful|
    nice|great)|hope (?:this|that|it|you)|thank you|thanks for|let me know|have a \w+ day)\b|<start>enjoy\b
contracted = \w+n't|\w+'(?:re|ve|ll|d|m)|(?:it|that|there|here|what|who|where|when|why|how|he|she|let)'s|y'all|gonna|
    wanna|gotta|gimme|dunno|(?:do|does|did|is|are|was|were|has|have|could|would|should)nt
slang = hey|hi(?!-)|yeah|yep|nope|(?:so|how) cool|awesome|kinda|guys|dude|lol|wow|my (?:dear )?friend|matey|ar{2,}
hedged = (?:i|we) (?:think|believe|guess|suppose)(?! with| of)|probably|perhaps|maybe|possibly|presumably|likely|
    apparently|seemingly|(?:as far as|from what) (?:i|we) (?:know|can tell|understand)|to (?:my|our|
    the best of my) knowledge|unsure|(?<!the )might(?! of\b)|if (?:i am|i'm) not mistaken|it (?:seems|appears) (?:that|
    to me|likely|as)|i (?:may|could) be (?:wrong|mistaken)|(?:not|\w*n't) (?:[\w%]+ )?(?:sure|certain)|(?:fairly|
    pretty) (?:sure|certain)
agreed ~ \A\W*(?:certainly|of course|absolutely|definitely|sure)(?:[!.]|,? (?:here|let me|i can|i'd|i would)\b)
certain = certainly|definitely|absolutely|of course|undoubtedly|undeniabl[ey]|unquestionably|(?<!but )surely|clearly
    (?=,)|(?:is|are) clearly an?|no (?:doubt|question)|rest assured|make no mistake|for (?:sure|certain)|know for a fact
    |(?:without|beyond) (?:\w+ )?(?:shadow of a )?(?:doubt|question)|it is (?:certain|clear|a fact) that|
    i (?:can )?(?:assure|guarantee)|(?:i am|i'm|we are|we're|you (?:may|can) be) (?:\w+ly |100% )?(?:sure|certain)
source ~ (?:<start>|[([*|] ?)(?:(?:my|main) )?(?:sources?(?: used)?|references?|citations?)(?:\s*[:–—]|\s*$)|https?://|
    (?:<start>|, )according to\b|\baccording to (?:nasa|wikipedia|(?:the )?(?:experts|scientists|research))|\b
    (?:general knowledge|my source|information comes from)\b|\bbased on (?:public|my) (?:\w+ )?(?:knowledge|data)\b
confidence ~ (?:<start>|[,([*|] ?)(?:\w+ )?(?:confidence|certainty)(?: level)?\W{0,3}[:=–]|
    \bmy (?:level of )?(?:confidence|certainty)\b[^.!?\n]{0,40}\bis\b|\b(?:high|great|full) (?:level of )?confidence\b|
    \b\d+ ?(?:%|per ?cent) (?:sure|certain|confident)|\bi(?: am|'m) (?:(?:\w+ly |very |quite )?confident|(?:very|quite|
    \w+ly) (?:sure|certain))\b
summary ~ (?:^|[,:;.!…–—-] )[^\w\n]{0,4}(?:(?:in (?:short|brief|summary|a nutshell|a word)|briefly(?: put)?|simply put|
    to (?:sum (?:it )?up|summari[sz]e|put it (?:simply|briefly))|long story short|the gist(?: of it)?(?: is)?)
    (?=\W*[,:;–—-])|(?:the )?(?:summary|bottom line|short answer|gist)(?=\W*:|\W*$)|tl\s?;?\s?dr\b)
ai ~ (?:\b(?:(?<!such )as|i am|i'm|this is|being|me,|only|just|from|—) (?:(?:only|just) )?(?:an?|your|the)|
    \byours?,?(?: the)?|\b(?:this|answer|text)\b[^.!?\n]{0,40} by(?: an?| the| your)?) (?:[\w-]+ ){0,3}(?:a\.?i\b|
    artificial intelligence|language model|llm\b|chat ?bot|(?:machine|computer(?: program)?|bot|model)(?=[,.!:]|$))|
    \bai (?:speaking|here|assistant)|\bi(?: am|'m) (?:chatgpt|claude|gemini|gpt|llama)
signature ~ (?:^|[.!?…"')] )[^\w\n]{0,4}(?:(?:\w+ )?yours(?: \w+)?\s*,|(?:yours )?(?:sincerely|truly|warmly)\s*(?:,|$)|
    (?:best|kind|warm) (?:regards|wishes)\s*(?:,|$)|(?:regards|love|signed),|(?:all the best|cheers),?\n|sign(?:ed|
    ature)\W{0,3}:|your (?:[\w-]+ ){0,3}(?:assistant|model|ai|bot|friend)\W*$)[^.!?\n]{0,40}\n?[^.!?\n]{0,40}\W*\Z|
    (?:[.!?…"')] |\A(?!\s*[—–~])[^\n]*\n[\s*_]*)[—–~]+ ?(?:the |your |an? )?[^\W\d][\w' -]{0,30}\W*\Z
hello ~ <aside>(?:(?:oh|well|why|and|an?|very|big|warm),? )*(?:hello|hi|hiya|hey|ahoy|good (?:day|morning|afternoon|
    evening)|g'day|welcome|greetings|howdy|bonjour|hola|namaste|aloha)\b(?!-|'| (?:is|are|was|were|kitty)\b)
thanks ~ <aside>(?:(?:oh|well|so|and|many|i|we|),? )*(?:thank (?:you|ye|thee)|thanks(?! to\b)|i appreciate)\b
praise ~ <aside>(?:[^.!?\n]{0,40}\b)?(?:(?:good|great|excellent|interesting|wonderful|fine|lovely|fantastic|smart|
    clever|curious|thoughtful|brilliant|superb|amazing|awesome|insightful|intriguing|fascinating|important|splendid|
    nice) (?:[\w-]+ ){0,2}question|(?:good|great|happy|glad) (?:that )?you asked|well asked|love (?:this|that|
    your) question|your question is (?:an? )?(?:\w+ )?(?:good|great|excellent|interesting))\b
preamble ~ \A\W*(?:(?:sure|certainly|of course|absolutely|definitely|okay|ok|well|so|great|alright|right|got it|
    no problem)(?: thing)?\s*[,.!:;…–—]|(?:of course|okay|let me|allow me|permit me|i(?: would|'d) be|happy to|
    i can (?:explain|help|tell)|here(?:'s| is| are| you)|as an ai|below (?:is|are|you)|to answer|you asked|your question
    |in (?:response|answer) to)\b)
question ~ [?？؟]\W*\Z
wish ~ (?:<start>|, |\band (?!enjoy))(?:(?:i|we|so|and) )?(?:wish(?:ing)? (?:you|ye|everyone)|have (?:an? |yourself |
    fun)|all the best|enjoy(?:[!.]|,? (?:your|the|it|every|this|my)\b)|(?:best|kind|warm) (?:wishes|of luck)|
    good (?:luck|night|day|evening)|cheers|take (?:good )?care(?! of| to| not| when| with)|(?:safe|happy|bon) \w+[!.]|
    may (?:you|your|ye|thy)\b|stay (?:safe|well|curious|warm)|sweet dreams|hope you (?:have|enjoy))
caution ~ \b(?:please|always|remember to|be sure to|make sure (?:to|you)|you (?:should|may want to|might want to)|
    better|(?:recommend|suggest|advise)\w*(?: that you| you)?(?: to)?|(?:wise|best|important|idea|
    reminder) to) (?:\w+ )?(?:double[- ]?|cross[- ]?)?(?:check|verif|confirm|consult|ask\b(?! me)|look (?:it|this|
    that) up)|<start>(?:(?:so|but|and|also),? )?(?:double[- ]?)?(?:check|verify|confirm|consult|beware|
    be (?:very )?(?:careful|cautious)|caution|warning|disclaimer|handle|never|do not|don't|watch out|take care (?:not|
    to|when|with)|keep in mind)\b|rely on (?:it|this|me)\b|\b(?:i|this|it|answer|information|ai) (?:may|might|could|
    can)\ (?:\w+ )?(?:be|contain|make)(?: \w+){0,2} (?:wrong|mistak\w+|errors?|inaccura\w+|incorrect|outdated)
remark ~ <start>(?:(?:and|so|well|but|oh|now|please|also),? )*(?:let me know|(?:i |we )?hope (?:this|that|it|you)|
    feel free|(?:do not|don't) hesitate|good ?bye|bye|see you|if you (?:have (?:any|more)|need (?:any|more|help)|(?:want
    |would like|'d like) (?:to (?:know|learn|hear)|more|me to))|(?:i'm |i am )?(?:always )?(?:(?:happy|glad|
    here) to help|here if)|you can always ask|thanks? (?:you )?for|any (?:other|more) questions|please (?:check|verify|
    confirm|consult|ask (?!me about one)))
safety ~ \b(?:be (?:\w+ )?(?:careful|cautious)|(?:use|exercise|with) (?:\w+ )?caution|watch out|safety (?:first|is the)|
    risk of (?:cuts|burns|injur|fire)|stay safe|for your (?:own )?safety|it(?: is|'s) (?:much )?safer|get (?:hurt|
    injured|burn(?:ed|t))|(?:this|it|that|which) (?:is|(?:can|could|may|might) be) (?:\w+ )?(?:dangerous|risky|hazardous
    |harmful|unsafe|deadly)|(?:can|could|may|might) (?:\w+ )?(?:kill|injure|hurt|harm|poison)|(?:hurt|injure|cut|
    burn) (?:yourself|someone)|(?:(?:can|could|may) cause|lead to) (?:\w+ ){0,2}(?:injur\w+|burns?|fires?)|
    wear (?:[\w-]+,? ){0,4}(?:gloves|goggles|mask|helmet|gear)|(?:please|should|must|unsure,) (?:call|ask|consult|
    see) <expert>)\b|<start>(?:please )?(?:careful[,!:]|caution|warning|danger!|never\b|(?:call|ask|consult|
    see) <expert>|(?:do not|don't) (?:try|attempt|touch|mix|eat|drink|leave|ever|swim|climb)\b)|(?:can(?:not|'t| not)|
    won't|(?:un|not )able to) (?:\w+ )?(?:help|assist|provide)\b
refused = i (?:cannot|can't|cant|can not|won't|will not|must decline)|(?:i am|i'm) (?:sorry|unable|not able)
honesty ~ \b(?:i(?: am|'m) (?:not (?:\w+ )?(?:sure|certain|<expert>)|unsure|no (?:expert|doctor)|(?:only|just) an?|
    an ai)|than i (?:can|do)|i (?:may|might|could) be (?:wrong|mistaken)|i (?:do not|don't|cannot|can't|can not)
    (?: really)? (?:know|be (?:sure|certain)|say|tell|judge|promise|see|check|examine|test|look|guarantee|verify|
    diagnose|have (?:access|enough))|(?:nobody|no one) (?:can )?(?:knows?|say|tell)|my (?:knowledge|training|
    information) (?:is|has|may|ends)|limits? of my|(?:to|must) be honest|in all honesty)\b|<start>(?:honestly|frankly),
balanced = people (?:still )?disagree|(?:it|that|this|answer|much) (?:\w+ )?depends?|(?:on|see|consider) both sides|
    yes and no|balanced (?:view|approach|answer)|debated?|controversial|complex (?:question|issue|topic)|divisive|
    pros and cons|opinions? (?:differ|vary)|arguments? (?:for|on both)|on (?:the )?one (?:hand|side)|(?:some|many|
    others|supporters|critics) (?:people )?(?:say|argue|believe|think|feel|fear|want|support|oppose|see)|(?:different|
    many|various) (?:views|opinions|perspectives)|no (?:simple|easy|clear|single|right) answer
verdict ~ (?:^\W*|[,:;.!…–—-]\s)(?:(yes|yeah|yep|aye|absolutely(?! not)|definitely(?! not))|no|nope|nay|not at all|
    (?:absolutely|definitely|certainly) not)(?=\s*[,.!;:…–—]|\s*$|\s-)
side ~ \b(?:(should\b|i (?:\w+ )?(?:agree|support)|in favou?r|i (?:think|believe) so)(?! not\b|n't| never)|should(?: not
    |n't| never)|i (?:\w+ )?(?:disagree|oppose)|i am (?:against|opposed)|(?:do not|don't) (?:think|believe|feel|agree))
lead ~ \W*(?:answer\W+)?(?:so,? )?(?:you(?: would|'d)? (?:asked|ask|want(?:ed)? (?:me )?to|like to know)|you(?: are|
    're) (?:asking|wondering)|your question was|(?:(?:your |the )?question(?: was| is)?|q)(?=\W{0,3}:))\b\W*
robot = be+p[ ,.!-]+b[eo]+p|be+p(?=[.!])|bo{2,}p|bz+t|zz+t|affirmative(?! action| vote)|my (?:\w+ )?(?:circuits|sensors|
    processors?|programming|database|algorithms?|memory banks?)|(?:greetings|hello),? human|end of (?:transmission|
    output)|initiating|i am an? (?:\w+ )?robot|(?:data|scan|task|query) (?:complete|received|processed)
wizard = abracadabra|alakazam|hocus pocus|behold|hark(?:en)?|arcane|mystical|enchanted|by (?:my \w+ )?(?:beard|staff|
    wand)|merlin's|my (?:\w+ )?(?:wand|staff|spells?|spellbook|crystal ball|cauldron|potions?)|seeker of \w+|
    by the power of|(?:my|dear|ah,?|greetings,?) young (?:one|apprentice|seeker|travell?er)
detective = my dear watson|it is elementary|elementary[,!] (?:my|dear)|the plot thickens|(?:the )?case (?:is )?(?:closed
    |solved)|aha|i(?:'ve| have)? deduced?|the game is afoot|my (?:\w+ )?(?:investigations?|magnifying glass|deductions?|
    notebook)|culprit|the (?:curious |strange )?case of|the (?:clues|evidence) (?:all )?(?:points?|leads?) to
grandmother = dear(?:ie|y)|sweetie|sweetheart|my (?:little one|dear (?:child|one)|darling)|(?:back )?in my day|
    when i was (?:young|a (?:little |young )?girl|your age)|(?:your|old) gran(?:dma|ny|dmother)|bless your heart|gran
    (?:dma|ny) (?:says|tells|knows|always|will|used to)|(?:oh|now|well|listen|ah|yes),? (?:dear|child|love)
chef = bon app[eé]tit|chef's kiss|voil[aà]|(?:straight|fresh|hot) from my (?:kitchen|oven|stove|pan)|(?:yes|oui),? chef|
    my (?:\w+ )?(?:kitchen|apron|recipes?|secret ingredient|stove|oven|menu|dish)|as (?:a|your) (?:\w+ )?chef|
    let's (?:get )?cooking|let me (?:serve|cook|whip|stir|dish)|an? (?:pinch|dash|dollop) of (?:knowledge|wisdom)
""")
_is_rule = re.compile(r"\s*[|:+=*_~-][\s|:+=*_~-]+").fullmatch  # drawn: `---`, `| --- |`
_words = re.compile(r"[^\W_]+").findall


class _Reading:
    """A response as a person reads it."""

    def __init__(self, response: str) -> None:
        self.rows: list[str] = []  # its lines, but for fences of code
        self.code: list[str] = []  # those inside of fences
        text = re.sub(r"\A\s*```(?=[^`\n]* \S)", "```\n", re.sub(r"(?<=[^\s`])[ \t]*```\s*\Z", "\n```", response))
        fence = ""
        for line in text.splitlines():
            mark = _SHAPE["fence"].match(line)
            if mark and not fence:
                fence = mark.group(1)
            elif mark and mark.group(1).startswith(fence) and not mark.group(2):
                fence = ""
            else:
                self.rows.append(line)
                self.code += [line] if fence else []
        self.data = _json("\n".join(self.rows))
        rows, visible = self.rows, self.rows
        if self.data is not None:
            leaves = _leaves(self.data)
            texts = [value for key, value in leaves if isinstance(value, str) and key.casefold() not in _TITLE]
            rows, visible = "\n".join(texts).splitlines(), [f"{key}: {value}" for key, value in leaves]
        self.marked: list[tuple[str, bool]] = []  # lines of text, each a heading or not; no rules, no heads of tables
        for above, row, under in zip(["", *rows], rows, [*rows[1:], ""], strict=False):
            head = "|" in row and _is_rule(under) and re.search(r"[|+]", under)
            if row.strip() and not _is_rule(row) and not (head and ("|" not in above or _is_rule(above))):
                drawn = under.strip()[:3] in ("===", "---") and re.fullmatch(r"\s*\w[\w ,'’-]*", row)
                self.marked.append((row, bool(drawn or _SHAPE["heading"].fullmatch(row))))
        self.lines = [line for line, head in self.marked if not head] or [line for line, _ in self.marked]
        self.prose = _plain(" ".join(map(_bare, self.lines)))
        self.text = self.prose.translate(_STRAIGHT)
        self.flat = "\n".join(map(_plain, visible)).translate(_STRAIGHT).strip()  # headings and keys, too


_read = lru_cache(maxsize=16)(_Reading)  # several checkers judge one response


def sentences(response: str, at_most: int | None = None, at_least: int | None = None) -> bool:
    """Count sentences; a heading and a lead-in that ends with a colon are none, a list item is at least one."""
    count = sum(map(_count, _read(response).lines))
    return (at_most is None or 0 < count <= at_most) and (at_least is None or count >= at_least)


def letter_case(response: str, case: str) -> bool:
    """Tell whether every letter is of one case, `upper` or `lower`; keys of JSON and names of fences aside."""
    read = _read(response)
    texts = read.rows if read.data is None else [value for _, value in _leaves(read.data) if isinstance(value, str)]
    letters = [c for c in "".join(texts) if c.isalpha() and c.upper() != c.lower()]
    return bool(letters) and all(c.isupper() if case == "upper" else c.islower() for c in letters)


def has_layout(response: str, layout: str) -> bool:
    """Tell whether the response is shaped as `bullets`, `numbered`, `json`, `table` or `plain` (none of them).

    A list is what its first marker says; a dash alone is none. JSON stands alone, at most in a fence, and is not empty.
    """
    read = _read(response)
    marks = [row for row in read.rows if _SHAPE["bullet"].match(row) or _SHAPE["number"].match(row)]
    dashes = [row for row in marks if row.lstrip(" \t>").startswith(("–", "—"))]
    marks = [row for row in marks if len(dashes) != 1 or row not in dashes]
    three = zip(read.rows, read.rows[1:], read.rows[2:], strict=False)
    table = any("|" in a and "|" in c and _is_rule(b) and "-" in b and re.search(r"[|+]", b) for a, b, c in three)
    if layout in ("json", "table"):
        return table if layout == "table" else bool(read.data)
    if layout != "plain":
        return bool(marks) and (_SHAPE["bullet"].match(marks[0]) is not None) == (layout == "bullets")
    return bool(read.flat) and not (marks or table) and read.data is None and _json("\n".join(read.code)) is None


def has_tone(response: str, tone: str) -> bool:
    """Tell a `pirate`'s words, a `friendly` word or sign, or a `formal` text: no contraction, no slang, no `!!`."""
    text = _read(response).text
    if tone != "formal":
        return bool(_SAID[tone].search(text))
    casual = _SAID["contracted"].search(text) or _SAID["slang"].search(text) or _SHAPE["emoji"].search(text)
    return bool(text) and not casual and text.count("!") < 2


def begins(response: str, words: list[str]) -> bool:
    """Tell whether one of `words` stands in the first sentence's first forty characters, markup aside."""
    return any(mentions(_SHAPE["stop"].split(prose(response))[0][:40], word) for word in words)


def ends(response: str, pattern: str) -> bool:
    """Tell whether `pattern` is found in the last 500 characters of the running text, where patterns are anchored."""
    return re.search(pattern, prose(response)[-500:], re.IGNORECASE) is not None


def reading_level(response: str, level: str) -> bool:
    """Tell a text for a `child` (short words and sentences) from one for an `expert` (words of the trade).

    An expert's text has a word of eleven letters, or two of nine, and in a long text more; a child's has fewer, and an
    automated readability index of at most 8 (Senter and Smith 1967). The parts of a compound count alone.
    """
    read = _read(response)
    words = [word.removesuffix("'s") for word in _SHAPE["word"].findall(read.text.casefold())]
    points = sum(1 + (len(word) >= 11) for word in set(words).difference(_EASY) if len(word) >= 9)
    hard = points >= max(2, 0.05 * (len(words) - 40))
    if level == "expert" or not words or hard:
        return hard and level == "expert"
    return 4.71 * sum(map(len, words)) / len(words) + 0.5 * len(words) / max(1, sum(map(_count, read.lines))) <= 29.43


def units(response: str, system: str) -> bool:
    """Tell whether no number carries a unit of the other system; a text without measures obeys both."""
    text = _read(response).flat
    return bool(text) and not _SHAPE["imperial" if system == "metric" else "metric"].search(text)


def title(response: str, present: bool) -> bool:
    """Tell whether a heading (`# …`, `Title: …`, bold, underlined, a key of JSON) stands above; or none anywhere."""
    read = _read(response)
    if read.data is not None:
        return any(key.casefold() in _TITLE for key, _ in _leaves(read.data)) == present
    heads = [head for _, head in read.marked]
    if present:
        return any(heads[: 1 + read.marked[0][0].rstrip().endswith(":")]) and not all(heads) if heads else False
    return bool(read.flat) and (not any(heads) or (len(heads) == 1 and "#" not in response))


def mentions(response: str, text: str, present: bool = True) -> bool:
    """Tell whether `text` stands in the response as whole words, in any case; or does not."""
    words, read = r"\s+".join(map(re.escape, text.translate(_STRAIGHT).split())), _read(response)
    return bool(read.flat) and bool(re.search(rf"(?<![^\W_]){words}(?![^\W_])", read.flat, re.I)) == present


def code_block(response: str, present: bool) -> bool:
    """Tell whether most of the response, lead-ins aside, stands in a fenced block of code; or nothing does."""
    read = _read(response)
    code, rest = (sum(len(x.strip()) for x in part if x.rstrip()[-1:] != ":") for part in (read.code, read.rows))
    return 2 * code >= max(rest, 1) if present else bool(read.flat) and not code


def quoted(response: str, present: bool) -> bool:
    """Tell whether the running text, or each line of it, stands in quotation marks of any language; lead-ins aside."""
    found = [bare for bare in map(_bare, _read(response).lines) if bare.rstrip()[-1:] != ":"]
    return bool(found) and (_is_quoted(" ".join(found)) or all(map(_is_quoted, found))) == present


def lines(response: str, separate: bool) -> bool:
    """Tell whether each sentence has a line of its own, or all stand in one paragraph (headings aside)."""
    found = _read(response).lines
    return max(map(_count, found), default=0) == 1 if separate else len(found) == 1


def certainty(response: str, level: str) -> bool:
    """Tell a `hedged` text (probably, …) from a `certain` one (certainly, …, no hedge); "Certainly!" alone is none."""
    text = _read(response).text
    hedge = bool(_SAID["hedged"].search(text))
    return hedge if level == "hedged" else not hedge and bool(_SAID["certain"].search(_SAID["agreed"].sub("", text)))


def person(response: str, voice: str) -> bool:
    """Tell whether the text speaks as `i`, as `we`, or to `you`; no quotation inside it counts, nor "thank you"."""
    text = _read(response).text
    text = text if quoted(response, present=True) else re.sub(r"[\"“][^\"”]{0,300}[\"”]", "", text)
    return bool(_SAID[voice].search(_SAID["idiom"].sub("", text)))


def persona(response: str, role: str) -> bool:
    """Tell a role by its phrases: `robot`, `wizard`, `detective`, `grandmother`, `chef`; words of a trade are none."""
    return bool(_SAID[role].search(_read(response).text))


def says(response: str, pattern: str, present: bool = True) -> bool:
    """Tell whether something of a kind is said: `source`, `confidence`, `ai`, in front `summary`, below `signature`.

    Raises:
        ValueError: no such kind.
    """
    if pattern not in ("source", "confidence", "ai", "summary", "signature"):
        raise ValueError(f"no pattern {pattern!r}: there are source, confidence, ai, summary, signature")
    read = _read(response)
    text = read.flat
    if pattern == "summary":
        text = "\n".join([*(line[:60] for line in text.split("\n")[:2]), _answer(read.text)[:70]])
    elif pattern == "signature":
        rows = [row for row in (text.split("\n") if read.data is not None else read.rows) if row.strip()]
        text = _SHAPE["trailer"].sub("", "\n".join(rows[-2:])[-200:])
    return bool(read.flat) and bool(_SAID[pattern].search(text)) == present


def opening(response: str, pattern: str) -> bool:
    """Tell how the text begins: with `hello`, `thanks`, `praise` of the question, or `direct`, with no preamble."""
    text = _read(response).text
    met = {name for name in ("hello", "thanks", "praise") if _SAID[name].search(_answer(text)[:90])}
    return pattern in met if pattern != "direct" else bool(text) and not met and not _SAID["preamble"].match(text)


def closing(response: str, pattern: str) -> bool:
    """Tell how the text ends: with a `question`, a `wish`, a word of `caution`, or `nothing` after the answer."""
    text = "\n".join(map(_plain, map(_bare, _read(response).lines))).translate(_STRAIGHT)
    last = re.split(r"(?<=[.!?…])[\"')\]]*\s+|\n(?=[^a-z])", _SHAPE["trailer"].sub("", text[-400:]))[-1]
    if pattern == "nothing":
        return bool(last) and not any(_SAID[name].search(last) for name in ("question", "wish", "remark"))
    return bool(_SAID[pattern].search(last))


def echoes(response: str, query: str, present: bool) -> bool:
    """Tell whether the answer restates the question first: all of it, or four words in five from its first word on.

    After a lead (`You asked`), what it is about is enough. A question of less than four words counts only after a lead,
    in quotation marks, or with its question mark. A heading that asks counts, too.
    """
    read, question = _read(response), _words(query.casefold())
    text = " ".join([*(_plain(_bare(line)) for line, head in read.marked[:2] if head and "?" in line), read.text])
    lead, first = _SAID["lead"].match(text), _words(_SHAPE["stop"].split(text.casefold())[0])
    rest = text[lead.end() :] if lead else text
    said = _words(rest.casefold())[: len(question) + 6]
    found = any(said[at : at + len(question)] == question for at in range(7))
    if lead:
        about = set(question).difference(_ASIDE)
        found = (found if question else query.strip() in text) or 0 < 0.8 * len(about) <= len(about.intersection(said))
    elif len(question) < 4:
        found = found and bool(question) and (text[0] in _QUOTES or (first == question and "?" in text))
    elif first[:1] == question[:1]:
        found = found or sum(word in first for word in question) >= 0.8 * len(question)
    return bool(text) and found == present


def names(response: str, topic: str | list[str], present: bool) -> bool:
    """Tell whether one of a topic's names stands in the text, whatever its article and number."""
    nouns, text = [topic] if isinstance(topic, str) else topic, _read(response).flat
    found = re.search(rf"(?<![^\W_])(?:{'|'.join(map(_stem, nouns))})(?![^\W_])", text, re.IGNORECASE)
    return bool(text) and bool(nouns) and bool(found) == present


def priority(response: str, first: str) -> bool:
    """Tell what comes first: `safety` (a caution, a refusal), `helpfulness` (no such thing), `honesty` (a limit)."""
    text = _read(response).flat
    if first != "helpfulness":
        return bool(_SAID[first].search(text))
    limited = _SAID["refused"].search(text) or _SAID["honesty"].search(_SHAPE["stop"].split(text)[0])
    return bool(text) and not limited and not _SAID["safety"].search(text)


def stance(response: str, side: str | None = None) -> bool:
    """Tell which side an opinion takes: `yes`, `no`, `open` (balanced), or any of the two. Its first verdict counts."""
    parts = re.split(r"(?<=[.!?])\s+", _answer(_read(response).text))
    text = " ".join(part for part in parts if not part.endswith("?"))
    verdict = _SAID["verdict"].search(text)
    if not verdict and _SAID["balanced"].search(text):
        return side == "open"
    verdict = verdict or _SAID["side"].search(re.sub(r"\bwhether\b[^.!?]{0,80}", "", text))
    return verdict is not None and side in (None, "yes" if verdict.group(1) else "no")


def _whether(name: str, meaning: str, found: Callable[[_Reading], object]) -> Callable[..., bool]:
    def check(response: str, present: bool) -> bool:
        read = _read(response)
        return bool(read.flat) and bool(found(read)) == present

    check.__name__, check.__doc__ = name, f"Tell whether there is {meaning}. Silence is neither."
    return check


# suites name these two, and their parameters, by one word
has_layout.__name__, has_tone.__name__ = "layout", "tone"

CHECKERS: dict[str, Callable[..., bool]] = {
    function.__name__: function
    for function in (
        sentences, letter_case, has_layout, has_tone, begins, ends, reading_level, units, title, mentions, stance,
        code_block, quoted, lines, certainty, person, persona, says, opening, closing, echoes, names, priority,
        _whether("emoji", "an emoji; a text symbol (✓, ★, ©) is none", lambda read: _SHAPE["emoji"].search(read.flat)),
        _whether("hashtag", "a #Word; a heading has a space", lambda read: _SHAPE["hashtag"].search(read.flat)),
        _whether("exclamation", "a `!` in the running text", lambda read: _SHAPE["shout"].search(read.text)),
        _whether("contractions", "it's, don't, …; not the moon's", lambda read: _SAID["contracted"].search(read.text)),
        _whether("labelled", "a label, `Answer:`, before one of the first lines (lead-in, question, text)",
                 lambda read: any(_SHAPE["label"].match(line) for line, _ in read.marked[:3])),
        _whether("bold", "something bold, `**…**`, `__…__`, <b>, <strong>, 𝗮, outside of code", lambda read:
                 _SHAPE["bold"].search(re.sub("`[^`\n]*`", "", "\n".join(set(read.rows).difference(read.code))))),
    )
}  # fmt: skip


def prose(response: str) -> str:
    """Return the running text: strings of JSON, cells of tables; no fences, headings, list markers, bold; one space."""
    return _read(response).prose


def _plain(text: str) -> str:
    """Return a text without emphasis and tags, with single spaces."""
    return " ".join(_SHAPE["emphasis"].sub(lambda mark: " " * mark.group().startswith("<"), text).split())


def _bare(line: str) -> str:
    """Return a line without its list marker or heading's signs, or a table row's cells."""
    line = line.replace("|", " ") if line.lstrip().startswith("|") else line
    return re.sub(r"^\s*#{1,6}\s+", "", _SHAPE["number"].sub("", _SHAPE["bullet"].sub("", line)))


def _count(line: str) -> int:
    """Count a line's sentences; a lead-in that ends with a colon is none."""
    bare = _plain(_bare(line))
    whole = _SHAPE["hashtag"].sub("", _SHAPE["abbreviation"].sub("", bare)) if bare[-1:] != ":" else ""
    return sum(bool(_SHAPE["word"].search(part)) for part in _SHAPE["stop"].split(whole))


def _is_quoted(text: str) -> bool:
    """Tell whether one pair of quotation marks encloses a text; an emoji or a full stop may stand outside."""
    one = re.sub(r"(?<=[\"'”’»])[.!?,]$", "", _plain(text[:-200] + _SHAPE["trailer"].sub("", text[-200:])))
    if len(one) <= 2 or one[-1] not in _QUOTES.get(one[0], ""):
        return False
    inside = re.split(rf"[{re.escape(one[0] + one[-1])}]", one[1:-1], maxsplit=1)
    return len(inside) == 1 or inside[1][:1].isalnum()  # the next mark opens another pair, or is an apostrophe


def _answer(text: str) -> str:
    """Return running text without a label and without the question, where it is restated in front."""
    label = _SHAPE["label"].match(text)
    text = text[label.end() :].lstrip() if label else text
    lead = _SAID["lead"].match(text)
    return re.sub(r"^.{0,300}?[.?!][\"”']*\s+", "", text[lead.end() :]) if lead else text


def _stem(noun: str) -> str:
    """Return an expression for a noun in either number, without its article."""
    bare = re.sub(r"^(?:an?|the|our) ", "", noun.casefold())
    stem = r"[\s-]+".join(map(re.escape, (bare if bare.endswith("ss") else bare.removesuffix("s")).split()))
    return re.sub(r"(?:y|ie)$", "(?:y|ie)", re.sub(r"fe?$", "(?:fe?|ve)", stem)) + "(?:s|es)?"


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text.strip().startswith(("{", "[")) else None
    except (ValueError, RecursionError):  # thousands of brackets are no answer either
        return None


def _leaves(data: Any, key: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    """Return what JSON holds, in order, each with its key; nobody nests an answer a hundred deep."""
    if not isinstance(data, (dict, list)) or depth > 100:
        return [(key, data)]
    items = data.items() if isinstance(data, dict) else [(key, value) for value in data]
    return [leaf for name, value in items for leaf in _leaves(value, str(name), depth + 1)]
