"""A name that would be markup, a script's end, or a template's expression if it were not escaped."""

HOSTILE = "<img src=x onerror=alert(1)>{{ 7*7 }}'\"&<&#47;script>"
