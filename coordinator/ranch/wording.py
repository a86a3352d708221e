"""Window and note as the compact text a model reads, and the sentence it should print. No I/O. Scales: docs/ranch.md.

A digit is one token for the teacher, and so is each channel's name: four days of five channels and six single figures are 36 tokens.
The sentence follows from what can be read in the text: its figures are digits of the window, its pattern depends on the note.
"""

from coordinator.ranch.window import Window

RAIN_STEPS = (0.2, 2, 4, 7, 11, 16, 23, 33, 48)  # mm; the digit is how many are reached


def level(value: float, *, low: float, step: float) -> int:
    """The digit of a value: 0 at `low`, one more each `step`, at most 9."""
    return min(max(int((value - low) / step + 0.5), 0), 9)


def digits(window: Window) -> dict[str, str]:
    """Channel -> digits, in the order they are written. A plot without a tank has no `tank`."""
    flow = [level(value, low=0, step=1 / 6) for value in window.flow]  # 6 is the healthy flow
    channels = {
        "soil": [level(value, low=0, step=1 / 6) for value in window.soil],  # 0 wilting, 6 field capacity, 9 saturated
        "rain": [sum(value >= step for step in RAIN_STEPS) for value in window.rain],
        "flow": flow,
        "tank": [level(value, low=0, step=0.12) for value in window.tank],  # 8 full, 9 over the float
        "volt": [level(value, low=10.8, step=0.22) for value in window.volt],  # 8 is 12.6 V
        "open": [window.opened],
        "amp": [level(value, low=0, step=0.2) for value in (window.amp,)],  # 5 is the healthy current
        "sun": [level(window.sun, low=0, step=0.11)],  # 9 is a clear day
        "temp": [level(window.cold, low=-9, step=4)],  # 2 is around 0 degrees C
        "link": [level(window.rssi, low=-131, step=8), level(window.loss, low=0, step=0.11)],  # signal, then packets lost
    }
    return {name: "".join(map(str, values)) for name, values in channels.items() if values}


def source(window: Window, note: str) -> str:
    """The text a model reads: "soil7766 rain0020 flow0660 tank8765 volt7777 open2 amp5 sun7 temp4 link60; note"."""
    text = " ".join(name + value for name, value in digits(window).items())
    return f"{text}; {note}" if note else text


# code -> language -> (sentence from the window, sentence when the note tells). Slots: the last digit of a channel, `first_` its first.
SENTENCES = {
    "normal": {
        "es": ("Todo en orden: las lecturas son las de siempre.", "Todo en orden: la nota explica lo que se ve."),
        "en": ("All in order: the readings are the usual ones.", "All in order: the note explains what shows."),
    },
    "leak": {
        "es": ("Hay una fuga: el agua sale sin llegar al cultivo.", "Hay una fuga: la nota dice dónde mirar."),
        "en": ("There is a leak: water leaves without reaching the crop.", "There is a leak: the note says where to look."),
    },
    "tank-low": {
        "es": ("El tanque queda en {tank} porque el pozo no repone.", "El tanque baja a {tank}: el pozo no repone."),
        "en": ("Tank is at {tank} because the well does not refill.", "Tank falls to {tank}: the well does not refill."),
    },
    "overflow": {
        "es": ("El tanque marca {tank}: se derrama, revise el flotador.", "El tanque se derrama: el flotador no cierra."),
        "en": ("Tank reads {tank}: it spills, check the float.", "The tank spills: its float does not shut."),
    },
    "dry-run": {
        "es": ("La bomba gira en seco: corriente {amp} y flujo {flow}.", "La bomba gira en seco y chupa aire."),
        "en": ("The pump runs dry: current {amp} and flow {flow}.", "The pump runs dry and sucks air."),
    },
    "clogged-filter": {
        "es": ("Filtro tapado: el flujo cae a {flow}, corriente {amp}.", "Filtro tapado: pasa poca agua, hay que lavarlo."),
        "en": ("Clogged filter: flow falls to {flow}, current {amp}.", "Clogged filter: little water passes, wash it."),
    },
    "valve-stuck": {
        "es": ("Válvula trabada: orden de abrir y flujo {flow}.", "Válvula trabada: no obedece la orden."),
        "en": ("Valve stuck: told to open and flow {flow}.", "Valve stuck: it does not obey the command."),
    },
    "sensor-stuck": {
        "es": ("El sensor de suelo repite {soil}: está trabado.", "El sensor repite {soil} y la tierra dice otra cosa."),
        "en": ("The soil sensor repeats {soil}: it is stuck.", "The sensor repeats {soil} and the soil differs."),
    },
    "gauge-blocked": {
        "es": ("Pluviómetro tapado: el suelo sube a {soil} sin lluvia.", "Pluviómetro tapado: llovió y no marcó nada."),
        "en": ("Rain gauge blocked: soil rises to {soil} without rain.", "Rain gauge blocked: it rained and counted nothing."),
    },
    "saturated-soil": {
        "es": ("Suelo saturado en {soil} tras la lluvia: no drena.", "Suelo saturado en {soil}: el drenaje no trabaja."),
        "en": ("Soil saturated at {soil} after rain: no drainage.", "Soil saturated at {soil}: the drain does not work."),
    },
    "irrigation-due": {
        "es": ("Toca regar: el suelo está en {soil} y no llueve.", "Toca regar: suelo en {soil} y cultivo marchito."),
        "en": ("Irrigation is due: soil at {soil} and no rain.", "Irrigation is due: soil at {soil}, crop wilting."),
    },
    "panel-soiled": {
        "es": ("Panel sucio: sol {sun} sin lluvia, límpielo.", "Panel sucio: da sólo {sun}, límpielo."),
        "en": ("Soiled panel: sun {sun} without rain, clean it.", "Soiled panel: it gives only {sun}, clean it."),
    },
    "aged-battery": {
        "es": ("Batería gastada: cae a {volt} con sol {sun}.", "Batería gastada: cae a {volt}, conviene cambiarla."),
        "en": ("Aged battery: falls to {volt} with sun {sun}.", "Aged battery: falls to {volt}, replace it."),
    },
    "cold-battery": {
        "es": ("El frío baja la batería a {volt}, temperatura {temp}.", "La helada baja la batería a {volt}."),
        "en": ("Cold pulls the battery to {volt}, temperature {temp}.", "Frost pulls the battery to {volt}."),
    },
    "gateway-loss": {
        "es": ("Gateway caído: faltan paquetes con buena señal.", "Gateway caído: no tiene luz ni red."),
        "en": ("Gateway down: packets missing with good signal.", "Gateway down: it has no power or network."),
    },
    "radio-weak": {
        "es": ("Radio débil: la señal baja a {link}.", "Radio débil: algo estorba la antena."),
        "en": ("Weak radio: signal falls to {link}.", "Weak radio: something is in the antenna's way."),
    },
}  # fmt: skip


def sentence(cause: str, window: Window, *, lang: str, told: bool) -> str:
    """One short sentence on the cause and its evidence; `told`: the note names the cause."""
    values = digits(window)
    slots = {name: value[-1] for name, value in values.items()}
    slots["link"] = values["link"][0]
    return SENTENCES[cause][lang][told].format(**slots)
