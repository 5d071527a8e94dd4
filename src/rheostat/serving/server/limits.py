"""What a request may ask for."""

from typing import Final

BODY_BYTES: Final = 4 << 20
BODY_SECONDS: Final = 20.0  # for the whole body to arrive
HEADER_SECONDS: Final = 20.0  # for the head of a request
SEND_SECONDS: Final = 60.0  # for a client to take the next piece of its answer
DISCARD_BYTES: Final = 256 << 20  # of a body that is too large, read so that its sender gets to see the answer

SAMPLES: Final = 128  # n times the number of prompts
PROMPTS: Final = 32  # of one request for completions
MAX_TOKENS: Final = 16_384  # within the model's context
MESSAGES: Final = 1024
STOPS: Final = 16
STOP_LENGTH: Final = 256
TOP_LOGPROBS: Final = 20

CHAT_TOKENS: Final = 1024  # token budget of a chat completion that names none, within the context
COMPLETION_TOKENS: Final = 16  # and of a completion: OpenAI's own

ROWS: Final = 64  # completions that run at a time
WAITING: Final = 256  # completions that wait for their turn
