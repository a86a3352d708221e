"""What the worker wrote beside the window, in the site's words. No I/O; randomness comes in.

Four kinds of note:
 * telling    names a concept ("charco por el tubo"); together with the window it decides, alone it does not
 * symptom    what several causes look like from the gate ("no llega agua")
 * stray      a telling phrase about something that is not the cause, often with a question mark: the window outweighs it
 * chatter    the day's talk
A site's own words replace the standard phrases of a concept. Notes are written as on a telephone: no accents, slips, shortcuts.
"""

from collections.abc import Mapping

import numpy as np

Phrases = Mapping[str, tuple[str, ...]]

# concept -> phrases; what a fault's telling note speaks of
SPANISH: Phrases = {
    "pipe": ("charco por el tubo", "tubo roto abajo", "se sale agua por la union", "tuberia rajada"),
    "supply": ("el pozo anda bajo", "no vino agua del pozo", "pozo casi seco", "no ha entrado agua"),
    "air": ("la bomba chupa aire", "bomba en vacio", "la bomba gira sin agua", "entra aire en la succion"),
    "filter": ("filtro con arena", "filtro lleno de lama", "hay que lavar el filtro", "malla del filtro sucia"),
    "valve": ("valvula trabada", "la valvula no responde", "valvula pegada", "llave electrica atascada"),
    "spill": ("bota agua por arriba", "el flotador no cierra", "se rebalsa", "cae agua por la tapa"),
    "probe": ("cave y no coincide", "cave y estaba distinto", "el sensor no se mueve", "sonda siempre igual"),
    "rained": ("llovio anoche", "cayo buen aguacero", "llovio duro aqui", "amanecio todo mojado de lluvia"),
    "drain": ("drenaje tapado", "no escurre nada", "el agua no baja del lote", "zanja tapada"),
    "wilt": ("hojas caidas", "matas marchitas", "planta triste, tierra polvo", "se dobla la hoja"),
    "dust": ("polvo en el panel", "panel sucio", "panel con caca de pajaro", "hojas sobre el panel"),
    "old": ("bateria vieja", "esa bateria ya tiene anos", "bateria inflada", "no guarda carga"),
    "frost": ("helada fuerte", "amanecio helado", "escarcha en la caja", "mucho frio de madrugada"),
    "power": ("se fue la luz en la casa", "gateway sin luz", "no hay internet en la casa", "se apago el router"),
    "trees": ("crecio el monte en la antena", "antena caida", "antena doblada", "ramas tapan la antena"),
    # benign: why a window that looks bad is normal
    "use": ("llenamos la fumigadora", "tomo mucho el ganado", "sacamos agua para lavar", "dimos agua al vecino"),
    "lines": ("abrimos dos lineas", "regamos dos lotes juntos", "prueba con las dos lineas", "doble linea hoy"),
    "half": ("solo media parcela", "cerramos un lado", "regamos la mitad", "medio sector hoy"),
    "hand": ("abri a mano un rato", "riego manual hoy", "la abri yo a mano", "riego extra a mano"),
    "steady": ("cave y coincide", "tierra igual, todo bien", "sonda revisada, bien", "esta igual de verdad"),
    "hose": ("regue con manguera", "eche agua con balde", "mojamos con manguera", "lavamos el lote con manguera"),
    "flood": ("inundado a proposito", "encharcamos a proposito", "lamina de agua puesta", "lo llenamos para fangueo"),
    "harvest": ("ya cosechamos", "lote en descanso", "sin siembra ahi", "ya se arranco todo"),
    "full": ("tanque lleno, cerro bien", "flotador cerro bien", "lleno justo", "tanque al tope, sin derrame"),
    "cloudy": ("puro nublado", "neblina toda la semana", "cielo cerrado", "sin sol estos dias"),
    "charge": ("cargamos celulares ahi", "prestamos la bateria", "conectamos una lampara", "usamos la bateria anoche"),
    "service": ("apagamos la antena para moverla", "mantenimiento del gateway", "reiniciamos el gateway", "cambio de gateway hoy"),
}  # fmt: skip
ENGLISH: Phrases = {
    "pipe": ("puddle by the pipe", "pipe split below", "joint is dripping a lot", "cracked pipe"),
    "supply": ("well is low", "no water from the well", "well nearly dry", "nothing came in"),
    "air": ("pump sucks air", "pump runs without water", "air in the suction", "pump spins empty"),
    "filter": ("sand in the filter", "filter full of slime", "filter needs washing", "dirty filter mesh"),
    "valve": ("valve jammed", "valve does not answer", "valve is stuck", "electric valve seized"),
    "spill": ("spills over the top", "float does not shut", "water over the rim", "running over the lid"),
    "probe": ("dug, does not match", "dug and it was different", "sensor never moves", "probe always the same"),
    "rained": ("it rained last night", "good shower here", "rained hard here", "all wet from rain"),
    "drain": ("drain is blocked", "water does not run off", "ditch is plugged", "field does not drain"),
    "wilt": ("leaves droop", "plants wilting", "plants sad, soil is dust", "leaves are curling"),
    "dust": ("dust on the panel", "dirty panel", "bird mess on the panel", "leaves on the panel"),
    "old": ("old battery", "that battery is years old", "battery is swollen", "holds no charge"),
    "frost": ("hard frost", "froze last night", "ice on the box", "very cold before dawn"),
    "power": ("power cut at the house", "gateway has no power", "internet down at the house", "router is off"),
    "trees": ("bush grew over the antenna", "antenna fell", "bent antenna", "branches cover the antenna"),
    "use": ("filled the sprayer", "cattle drank a lot", "took water for washing", "gave water to the neighbour"),
    "lines": ("opened two lines", "watered two plots at once", "testing both lines", "double line today"),
    "half": ("only half the plot", "closed one side", "watered one half", "half sector today"),
    "hand": ("opened it by hand", "manual watering today", "I opened it myself", "extra watering by hand"),
    "steady": ("dug and it matches", "soil the same, all fine", "probe checked, fine", "it really is the same"),
    "hose": ("watered with the hose", "threw buckets of water", "wet it with the hose", "hosed the plot down"),
    "flood": ("flooded on purpose", "ponded it on purpose", "water layer is wanted", "filled it for puddling"),
    "harvest": ("already harvested", "plot is resting", "nothing sown there", "crop is pulled out"),
    "full": ("tank full, shut well", "float shut fine", "just full", "full to the top, no spill"),
    "cloudy": ("cloudy all along", "fog all week", "closed sky", "no sun these days"),
    "charge": ("charged phones there", "lent the battery", "hooked up a lamp", "used the battery last night"),
    "service": ("switched antenna off to move it", "gateway maintenance", "restarted the gateway", "new gateway today"),
}  # fmt: skip
STANDARD: Mapping[str, Phrases] = {"es": SPANISH, "en": ENGLISH}
BENIGN = ("use", "lines", "half", "hand", "steady", "hose", "flood", "harvest", "full", "cloudy", "charge", "service")
CONCEPTS = tuple(concept for concept in ENGLISH if concept not in BENIGN)

# what a part of the plant looks like from the gate, whatever the cause
SYMPTOMS: Mapping[str, Phrases] = {
    "es": {
        "tank": ("el tanque baja raro", "poca agua en el tanque", "hay agua en el suelo"),
        "pump": ("no llega agua", "la bomba suena raro", "poca presion"),
        "soil": ("la tierra esta rara", "no cuadra la humedad", "ver lote"),
        "power": ("se apaga de noche", "poca carga", "luz roja en la caja"),
        "radio": ("no hay senal", "faltan datos", "el nodo no aparece"),
    },
    "en": {
        "tank": ("tank looks odd", "not much in the tank", "water on the ground"),
        "pump": ("no water arrives", "pump sounds odd", "low pressure"),
        "soil": ("soil looks odd", "moisture does not add up", "see the plot"),
        "power": ("goes off at night", "little charge", "red light on the box"),
        "radio": ("no signal", "data missing", "node does not show"),
    },
}  # fmt: skip
CHATTER: Mapping[str, tuple[str, ...]] = {
    "es": ("todo tranquilo", "mucho calor", "vuelvo manana", "vino el veterinario", "reviso el lunes", "sin novedad", "viento fuerte"),
    "en": ("all quiet", "very hot", "back tomorrow", "vet was here", "will check monday", "nothing new", "strong wind"),
}
SHORTCUTS = {"por": "x", "que": "q", "para": "pa", "esta": "ta", "and": "&", "with": "w", "water": "watr", "agua": "awa", "the": "d"}


def telling(concept: str, *, lang: str, words: Mapping[str, Mapping[str, tuple[str, ...]]], local: float, rng: np.random.Generator) -> str:
    """A phrase for the concept: the site's own with probability `local` where it has one, else a standard one."""
    own = words.get(lang, {}).get(concept, ())
    phrases = own if own and rng.random() < local else STANDARD[lang][concept]
    return phrases[rng.integers(len(phrases))]


def symptom(part: str, *, lang: str, rng: np.random.Generator) -> str:
    """What the part ("tank", "pump", "soil", "power", "radio") looks like from the gate."""
    phrases = SYMPTOMS[lang][part]
    return phrases[rng.integers(len(phrases))]


def chatter(*, lang: str, rng: np.random.Generator) -> str:
    """The day's talk, which tells nothing."""
    phrases = CHATTER[lang]
    return phrases[rng.integers(len(phrases))]


def doubt(phrase: str, *, lang: str) -> str:
    """The phrase as a worry."""
    return f"{'sera' if lang == 'es' else 'maybe'} {phrase}?"


def slip(note: str, rng: np.random.Generator) -> str:
    """The note with one slip: a shortcut, a dropped letter or two letters exchanged. Short words stay as they are."""
    parts = note.split(" ")
    short = [at for at, part in enumerate(parts) if part in SHORTCUTS]
    if short and rng.random() < 0.5:
        at = short[int(rng.integers(len(short)))]
        parts[at] = SHORTCUTS[parts[at]]
        return " ".join(parts)
    long = [at for at, part in enumerate(parts) if len(part) > 4]
    if not long:
        return note
    at = long[int(rng.integers(len(long)))]
    letter = int(rng.integers(1, len(parts[at]) - 2))
    word = parts[at]
    swapped = word[:letter] + word[letter + 1] + word[letter] + word[letter + 2 :]
    parts[at] = word[:letter] + word[letter + 1 :] if rng.random() < 0.5 else swapped
    return " ".join(parts)
