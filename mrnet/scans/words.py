"""What the words of a series' header or file name tell: contrast, kind of picture, body part.

All expressions below match text as `words_of` returns it, but for KNEE and AGENT, which match any
lower-case text.
"""

import itertools
import re
import unicodedata

FAT_SUPPRESSED = re.compile(r"fs\b|\bfspd|fat ?sat|fat ?sup|spair|\bspir\b|stir|tirm|water|\bwe\b")
NOT_SUPPRESSED = re.compile(r"\b(no|non|without|wo|w o|w out) ?(fs|fat)|\b(n|un)fs\b")
FLUID = re.compile(r"pd|t2|proton|\bdp\b|stir|tirm|spair|\bspir\b|fs\b|fat ?sat|water")
T1 = re.compile(r"\bt1(?!\d)")
# Philips puts a letter before T1W (cT1W_TSE: coronal), others the plane or 3D; SET1 is no contrast.
FUSED_T1 = re.compile(r"\b([a-z]|[23]d|ax|axial|tra|trans|cor|coronal|sag|sagittal|obl)t1(?!\d)")
# Names a contrast that is no T1. The other words of FLUID are fat suppression, of a T1 as well.
NOT_T1 = re.compile(r"pd|t2|proton|\bdp\b|stir|tirm")
GRADIENT_ECHO = re.compile(
    r"dess|\b(gre|b?ffe|tfe|flash|vibe|f?spgr|fiesta|merge|medic|ciss|trufi|(fl|de)[23]d)\b"
)
# Contrast agent; "post" alone is also posterior and post-operative, but then a contrast is named.
AGENT = re.compile(r"(?<![a-z])(post(?![ _-]?op|[a-z])|gad|gd(?![a-z])|contrast|c ?\+)|"
                   r"\+ ?c(?![a-z])")  # fmt: skip
NO_AGENT = re.compile(r"(?<![a-z])(no|non|pre|w/?o|without)[ _-]?(iv[ _-]?)?(gad|gd|contrast)")
# A Dixon scan is four series: water, fat, in phase and out of phase. "Flex" is a coil, too.
DIXON = re.compile(r"dixon|\bflex\b|\bideal\b")
DIXON_WATER = re.compile(r"\bw\b(?! ?o)|water")
DIXON_OTHER = re.compile(r"^fat\b|\b(f|fat|op|out)$|\b(opp|oop|out ?phase|opposed)\b")
LOCALISER = re.compile(r"survey|scout|locali[sz]er|\b3 ?p(lane|l)? ?loc\b")
LOC = re.compile(r"\bloc\b")  # a localiser, or what it was planned on: Siemens' "ext loc ref"
# ImageType's words for what is computed from other images or taken off a screen; an underscore
# counts as a space. MPR, a cut through a volume, is a picture like any other.
NO_PICTURES = {
    "LOCALIZER": "localiser", "MOSAIC": "mosaic of slices", "PROJECTION IMAGE": "projection",
    "MIP": "projection", "MINIP": "projection", "MAX IP": "projection", "MIN IP": "projection",
    "SUBTRACTION": "subtraction", "SUB": "subtraction", "SCREEN SAVE": "screen capture",
}  # fmt: skip
MAP = re.compile(r"\b(t[12]|t1rho)?maps?\b|\bmapping\b")
MAPS = {"ADC", "T1 MAP", "T2 MAP", "T2_STAR MAP", "R2 MAP", "R2_STAR MAP", "PHASE MAP", "P"}
WATER_KINDS = {"WATER", "W"}
FAT_KINDS = {"FAT", "F", "FAT_FRACTION", "FF", "OUT_PHASE", "OPP_PHASE", "OPPOSED_PHASE", "OP"}
# Words of BodyPartExamined (PS3.16 annex L), of an anatomic region or of a title that are no knee.
# LEG and LOWER EXTREMITY may be one.
OTHER_PARTS = re.compile(
    r"\b((abdomen|ankle|arm|brain|breast|buttock|chest|clavicle|coccyx|elbow|eye|face|finger|foot|"
    r"forearm|hand|head|heart|hip|humerus|jaw|kidney|liver|neck|orbit|pelvis|prostate|sacrum|"
    r"shoulder|skull|thorax|thumb|toe|wrist|si ?joint|[clst]{0,2} ?spine|spinal|lumbar|thoracic|"
    r"cervical|thigh|femur|tibia|fibula|calf|(lower|upper) ?leg(?! joint))s?)+\b(?! coil)"
)
COILS = {"arm", "foot", "hand", "head", "neck"}  # in descriptions these are coils and positions
KNEE = re.compile(
    r"knee|knie|kn[äæ]|\bkne\b|genou|rodilla|ginocch|joelho|patell|kolan|kolen|koljen|polvi|põlv|"
    r"genunchi|térd|\bdiz\b|γόνα|γονα|колен|колян|колін|膝|무릎"
)

LEFT = re.compile(r"left|links|linke[rs]?|gauche|izquierd[ao]|sinistr[ao]|esquerd[ao]")
RIGHT = re.compile(r"right|rechts|rechte[rs]?|droite?|derech[ao]|destr[ao]|direit[ao]")
ABBREVIATED = {"lt": "L", "rt": "R"}
OF_KNIE, OF_GINOCCHIO = {"li": "L", "re": "R"}, {"sx": "L", "dx": "R"}
LOWER_JOINT = re.compile(r"\blow(er)? ext(remity)?\b")  # "MRI LOW EXT JT LT": knees are called that


def words_of(text):
    """A text in lower case, its words separated by single spaces; GE writes F/S for fs."""
    return " ".join(re.findall("[a-z0-9]+", re.sub(r"\bf/s\b", "fs", text.lower())))


def says_t1(words):
    """Whether `words_of` a description name T1."""
    return bool(T1.search(words) or (FUSED_T1.search(words) and not NOT_T1.search(words)))


def says_loc(words):
    """Whether `words_of` a description may mean a localiser, which its slices' distance tells."""
    return bool(LOC.search(words))


def says_agent(description):
    """Whether a description says that contrast agent was given."""
    text = description.lower()
    return bool(AGENT.search(NO_AGENT.sub("", text)))


def other_picture(words, kinds=frozenset()):
    """What a series shows in place of the anatomy in one of its contrasts, or ''.

    Args:
        words: its description's, as `words_of` returns them.
        kinds: values of DICOM's ImageType from the third on, upper case.
    """
    if LOCALISER.search(words):
        return "localiser"
    if kinds & MAPS or MAP.search(words):
        return "a map of a quantity, not a picture"
    is_other = DIXON.search(words) and DIXON_OTHER.search(words)
    is_suppressed = FAT_SUPPRESSED.search(words) or NOT_SUPPRESSED.search(words)
    if kinds & FAT_KINDS or (is_other and not is_suppressed):
        return "the fat or opposed-phase picture of a Dixon scan"
    return ""


def names_knee(text):
    return bool(KNEE.search(unicodedata.normalize("NFC", text.lower())))


def parts_in(text):
    """The parts of the body that a text names and that are no knee, in its order."""
    return [found[0] for found in OTHER_PARTS.finditer(words_of(text))]


def other_part(region, series, study):
    """The part of the body, "ANKLE", that a header names where it is no knee, or ''.

    Args:
        region: BodyPartExamined and the anatomic region. Often a scanner's leftover: a series or
            study that is called a knee is one.
        series: the series' description and protocol.
        study: the study's description. One of "knee and ankle" has series of both.
    """
    if names_knee(f"{region} {series}"):
        return ""
    tagged, titled = parts_in(region), parts_in(study)
    named = [part for part in parts_in(series) if part not in COILS]
    if names_knee(study):
        parts = tagged if named and tagged else [part for part in named if part in titled]
    else:
        parts = tagged or named or titled
    return parts[0].upper() if parts else ""


def sides_in(title):
    """The knees that a title names: set of L and R.

    Short forms count where it names the joint, a single letter beside the word knee: elsewhere "R"
    is a direction of phases, and "RT" a trigger. With one short form all others count, so that
    "KNEE R>L" names both.
    """
    text = words_of(title)
    words, has_knee = text.split(), names_knee(text)
    long = {"L": LEFT, "R": RIGHT}
    short = ABBREVIATED if has_knee or LOWER_JOINT.search(text) else {}
    if "knie" in words:
        short = short | OF_KNIE
    if "ginocchio" in words:
        short = short | OF_GINOCCHIO
    pairs = [pair for two in itertools.pairwise(words) for pair in (two, two[::-1])]
    if any(word in ("l", "r") and names_knee(other) for word, other in pairs):
        short = short | {"l": "L", "r": "R"}
    said = {side for side in long for word in words if long[side].fullmatch(word)}
    return said | {short[word] for word in words if word in short}
