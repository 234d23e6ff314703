"""One trainer: language models, vision-language models and experts are configs of it."""
