"""Bytes as tokens for the transformers library: id = byte; 0 is the end of text, which opens every document."""

from transformers import PreTrainedTokenizer

END = "<|endoftext|>"


class ByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes. Encoding puts the end of text before the text, as the model was trained."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        kwargs = {"bos_token": END, "eos_token": END, "pad_token": END} | kwargs
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {END: 0} | {chr(byte): byte for byte in range(1, 256)}

    def _tokenize(self, text, **kwargs):
        return [chr(byte) for byte in text.encode("utf-8")]

    def _convert_token_to_id(self, token):
        return 0 if token == END else ord(token)

    def _convert_id_to_token(self, index):
        return chr(index) if index else END

    def convert_tokens_to_string(self, tokens):
        return b"".join(bytes([ord(t)]) for t in tokens if t != END).decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(self, ids, other=None):
        return [0, *ids] if other is None else [0, *ids, 0, *other]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
