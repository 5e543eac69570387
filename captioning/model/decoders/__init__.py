"""Caption decoders: the table of their names. Adding one is a file beside this one and a line here; protocol.py says
what it has to offer."""

from captioning.model.decoders.attention import AttentionDecoder
from captioning.model.decoders.lstm import LstmDecoder
from captioning.model.decoders.protocol import Decoder
from captioning.model.decoders.transformer import TransformerDecoder
from captioning.model.decoders.updown import UpDownDecoder

DECODERS: dict[str, type[Decoder]] = {
    "lstm": LstmDecoder,
    "attention": AttentionDecoder,
    "transformer": TransformerDecoder,
    "updown": UpDownDecoder,
}
