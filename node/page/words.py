"""Every text on the node's page, in English and Spanish, for somebody who works in the field: plain words, short, no reproach. No I/O.

One place, so that neither language falls behind; a test holds them together, and the verdicts and the doctor's findings to those there are.
Why an answer is as it is has its words in protocol/reasons.py, which the API reads too.
{name} is filled in; "one|many" follows the value n. Spanish says usted. Words are the glossary's: node, answer, model, release.
"""

from collections.abc import Mapping
from typing import ClassVar

from protocol import words

TEXTS: dict[str, tuple[str, str]] = {
    # every page
    "skip": ("Skip to the content", "Ir al contenido"),
    "ago": ("{span} ago", "hace {span}"),
    "line.on": ("live", "en vivo"),
    "line.as-of": ("as of {time}", "a las {time}"),
    "line.cut": ("No connection to the node; this is as of {time}", "Sin conexión con el nodo; esto es de las {time}"),
    "log-out": ("Log out", "Salir"),
    # the first sentence
    "works": ("It works.", "Funciona."),
    "works-not": ("It does not answer yet.", "Todavía no responde."),
    "today": (
        "{count} answer in the last 24 hours.|{count} answers in the last 24 hours.",
        "{count} respuesta en las últimas 24 horas.|{count} respuestas en las últimas 24 horas.",
    ),
    # what a person should look at
    "attention": ("Needs attention", "Hay que atender"),
    "detail": ("Details for the technician", "Detalles para el técnico (en inglés)"),
    "find.clock": (
        "The clock is wrong. Answers go on, updates may not.",
        "El reloj está mal. Sigue respondiendo; las actualizaciones quizá no.",
    ),
    "find.disk": ("The disk is almost full, or cannot be written.", "El disco está casi lleno, o no se puede escribir."),
    "find.port": ("The page's address has a problem.", "La dirección de la página tiene un problema."),
    "find.model": ("The model has a problem.", "El modelo tiene un problema."),
    "find.broker": ("No connection to the other nodes. Answers go on.", "Sin conexión con los otros nodos. Sigue respondiendo."),
    "find.release": ("No new release of the model for a long time.", "Hace mucho que no llega una versión nueva del modelo."),
    "find.clock.warn": ("Nobody sets the clock. It may drift.", "Nadie ajusta el reloj. Puede atrasarse."),
    "find.calibration": ("How far this model can be trusted is not measured.", "No se ha medido cuánto se puede confiar en este modelo."),
    "find.confidence": ("Other nodes may not be asked any more today.", "Hoy ya no se puede preguntar a otros nodos."),
    "find.learning": ("Learning from your answers has a problem.", "Aprender de sus respuestas tiene un problema."),
    "find.link": ("The connection has a problem, or no data left today.", "La conexión tiene un problema, o ya no tiene datos por hoy."),
    "find.peers": ("The other nodes cannot be asked.", "No se puede preguntar a los otros nodos."),
    "find.power": ("The battery or the panel is not known well enough.", "No se conoce bien la batería o el panel."),
    "find.files": ("A file that the settings name is missing.", "Falta un archivo que nombra la configuración."),
    "find.broker certificate": (
        "A certificate for the connection to the other nodes ends or is wrong.",
        "Un certificado de la conexión con los otros nodos vence o no sirve.",
    ),
    "find.topic certificate": (
        "A certificate of the site's own broker ends or is wrong.",
        "Un certificado del broker del sitio vence o no sirve.",
    ),
    "find.SuperLink certificate": (
        "A certificate for sending what was learned ends or is wrong.",
        "Un certificado para enviar lo aprendido vence o no sirve.",
    ),
    "find.SuperLink": ("What was learned cannot be sent. Answers go on.", "No se puede enviar lo aprendido. Sigue respondiendo."),
    "find.free memory": ("There is too little free memory.", "Queda muy poca memoria libre."),
    "find.topic": ("No connection to the site's own broker.", "Sin conexión con el broker del sitio."),
    "find.spool": ("Files put into the folder are not answered.", "Los archivos puestos en la carpeta no se responden."),
    "find.coordinator": ("The coordinator does not answer. Answers go on.", "El coordinador no responde. El nodo sigue respondiendo."),
    "find.trust": ("The signatures of the releases get old.", "Las firmas de las versiones se hacen viejas."),
    "find.supply": ("The power supply is too weak.", "La corriente no alcanza."),
    "find.temperature": ("The node is too hot. Give it shade and air.", "El nodo está muy caliente. Dele sombra y aire."),
    "find.wear": ("The memory card wears out. Have a new one ready.", "La tarjeta de memoria se gasta. Tenga otra lista."),
    "find.memory": ("The memory needs a look.", "La memoria necesita revisión."),
    "find.other": ("Something needs a look: {what}", "Algo necesita revisión: {what}"),
    # one answer to check
    "check": ("Please check", "Por favor, revise"),
    "check.none": (
        "Nothing to check. When the node is not sure of an answer, it asks you here.",
        "Nada que revisar. Cuando el nodo no está seguro de una respuesta, le pregunta aquí.",
    ),
    "check.seen-all": ("That was all. Those you left for later are still here.", "Eso era todo. Lo que dejó para después sigue aquí."),
    "check.again": ("From the beginning", "Desde el principio"),
    "check.thinks": ("The node thinks", "El nodo cree"),
    "check.nothing": ("The node could not say", "El nodo no supo decir"),
    "check.right": ("Yes, that is right", "Sí, está bien"),
    "check.choose": ("No, it is:", "No, es:"),
    "check.what": ("What is it?", "¿Qué es?"),
    "check.say": ("In your words (only if you like)", "Con sus palabras (solo si quiere)"),
    "check.text": ("The right text", "El texto correcto"),
    "check.save": ("Save this text", "Guardar este texto"),
    "check.later": ("Later", "Después"),
    "check.more": ("{count} more waits|{count} more wait", "Espera {count} más|Esperan {count} más"),
    "check.change": ("Change this answer", "Cambiar esta respuesta"),
    "saved": ("Saved: {answer}. Thank you.", "Guardado: {answer}. Gracias."),
    "saved.change": ("Change it", "Cambiarlo"),
    "not-saved": ("Not saved: no connection to the node. Tap again.", "No se guardó: sin conexión con el nodo. Toque otra vez."),
    "not-saved.bad": (
        "Not saved: the node did not understand it. Open the page again and tap there.",
        "No se guardó: el nodo no lo entendió. Abra la página otra vez y toque allí.",
    ),
    "not-saved.empty": ("Not saved: nothing was written or chosen.", "No se guardó: no se escribió ni se eligió nada."),
    "not-saved.long": ("Not saved: the text has over {limit} characters.", "No se guardó: el texto tiene más de {limit} caracteres."),
    "not-saved.gone": ("Not saved: that answer is not kept here any more.", "No se guardó: esa respuesta ya no se guarda aquí."),
    "not-saved.elsewhere": (
        "Not saved: this came from another page. Open the node's page and tap there.",
        "No se guardó: esto vino de otra página. Abra la página del nodo y toque allí.",
    ),
    # latest answers
    "latest": ("Latest answers", "Últimas respuestas"),
    "latest.none": ("No answers yet. The first one appears here by itself.", "Todavía no hay respuestas. La primera aparece aquí sola."),
    "latest.none-how": ("To try it, on the node:", "Para probar, en el nodo:"),
    "asked": ("What it was asked", "Lo que se le preguntó"),
    "why": ("Why it says so", "Por qué lo dice"),
    "sure": ("{share} sure", "{share} de seguridad"),
    "state.final": ("sure", "segura"),
    "state.provisional": ("not sure, asking another node", "no es segura, pregunta a otro nodo"),
    "state.unconfirmed": ("not sure", "no es segura"),
    "state.upgraded": ("put right by another node", "corregida por otro nodo"),
    "state.confirmed": ("another node agrees", "otro nodo está de acuerdo"),
    "state.confirmed-here": ("confirmed here", "confirmada aquí"),
    "state.corrected": ("put right here", "corregida aquí"),
    # the machine
    "machine": ("This node", "Este nodo"),
    "machine.model": ("Model", "Modelo"),
    "machine.release": ("release {number}, {digest}", "versión {number}, {digest}"),
    "machine.fixed": ("a fixed file, {digest}", "un archivo fijo, {digest}"),
    "machine.none": ("none yet", "todavía ninguno"),
    "machine.energy": ("Energy today", "Energía hoy"),
    "machine.power": ("Power", "Corriente"),
    "machine.data": ("Data today", "Datos hoy"),
    "machine.of": ("{used} of {limit}", "{used} de {limit}"),
    "machine.not-measured": ("not measured", "no se mide"),
    "machine.learned": ("Answers confirmed here", "Respuestas confirmadas"),
    "machine.link": ("Other nodes", "Otros nodos"),
    "machine.alone": ("none: it works alone", "ninguno: trabaja solo"),
    "machine.connected": ("connected", "conectado"),
    "machine.waiting": (
        "not connected; {count} message waits|not connected; {count} messages wait",
        "sin conexión; espera {count} mensaje|sin conexión; esperan {count} mensajes",
    ),
    "machine.up": ("Running for", "Encendido desde hace"),
    "machine.good": ("Checks", "Revisión"),
    "machine.all-good": (
        "{count} thing checked, all well|{count} things checked, all well",
        "{count} cosa revisada, bien|{count} cosas revisadas, todo bien",
    ),
    "machine.some": (
        "{count} needs attention, see above|{count} need attention, see above",
        "{count} por atender, vea arriba|{count} por atender, vea arriba",
    ),
    "power.mains": ("mains", "red eléctrica"),
    "power.battery": ("battery", "batería"),
    "power.solar": ("sun", "sol"),
    "power.charge": ("{source}, battery {share}", "{source}, batería {share}"),
    # the door
    "door": ("Who are you?", "¿Quién es usted?"),
    "door.key": ("Key of this node", "Clave de este nodo"),
    "door.told": (
        "Whoever installed the node has it. This telephone is asked once.",
        "La tiene quien instaló el nodo. A este teléfono se le pide una vez.",
    ),
    "door.enter": ("Enter", "Entrar"),
    "door.wrong": ("That is not the key. Please look at it again.", "Esa no es la clave. Por favor, mírela otra vez."),
    "door.elsewhere": ("Please type the key on this page.", "Por favor, escriba la clave en esta página."),
}

VERDICTS: dict[str, tuple[str, str]] = {  # code -> what a person calls it
    "normal": ("All normal", "Todo normal"),
    "irrigation-due": ("Needs water", "Hay que regar"),
    "saturated-soil": ("Soil too wet", "Suelo muy mojado"),
    "leak": ("Water leak", "Fuga de agua"),
    "dry-run": ("Pump runs dry", "Bomba sin agua"),
    "clogged-filter": ("Filter clogged", "Filtro tapado"),
    "valve-stuck": ("Valve stuck", "Válvula trabada"),
    "tank-low": ("Tank low", "Tanque bajo"),
    "overflow": ("Tank overflows", "Tanque rebosa"),
    "sensor-stuck": ("Sensor stuck", "Sensor trabado"),
    "gauge-blocked": ("Rain gauge blocked", "Pluviómetro tapado"),
    "panel-soiled": ("Solar panel dirty", "Panel solar sucio"),
    "cold-battery": ("Battery cold", "Batería fría"),
    "aged-battery": ("Battery worn out", "Batería gastada"),
    "gateway-loss": ("Antenna not connected", "Antena sin conexión"),
    "radio-weak": ("Radio signal weak", "Señal de radio débil"),
}


class Words(words.Words, frozen=True):
    """How this reader is spoken to."""

    texts: ClassVar[Mapping[str, tuple[str, str]]] = TEXTS

    def verdict(self, code: str) -> str:
        """What a person calls a verdict; the code itself when it is newer than this program."""
        return VERDICTS[code][words.LANGUAGES.index(self.lang)] if code in VERDICTS else code
