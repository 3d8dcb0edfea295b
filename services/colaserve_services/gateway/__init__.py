"""OpenAI's HTTP interface in front of `GenerationService`. Knows neither torch nor the stages."""
