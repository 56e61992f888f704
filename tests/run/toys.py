"""A tokenizer of one token a character, small enough to reason about in a test."""

END, USER, ASSISTANT = 1, 2, 3
FIRST = 4  # of the characters
VOCABULARY = 132


class CharTokenizer:
    """`encode("a")` is one id; a chat is role id, characters, end; the assistant's characters and end are learnt."""

    eos_id = END

    def encode(self, text):
        return [FIRST + min(ord(c), 127) for c in text]

    def decode(self, ids):
        return "".join(chr(i - FIRST) for i in ids if i >= FIRST)

    def chat_tokens(self, messages):
        ids, learnt = [], []
        for message in messages:
            said, is_assistant = self.encode(message["content"]), message["role"] == "assistant"
            ids += [ASSISTANT if is_assistant else USER, *said, END]
            learnt += [False] + [is_assistant] * (len(said) + 1)
        return ids, learnt
