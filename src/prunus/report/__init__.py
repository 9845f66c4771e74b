"""One page about a result: self-contained HTML that needs no network.

charts.py     plan, table and figures → charts: a Vega-Lite specification and the same as a table each
contents.py   a folder that prunus wrote → what the page says, as plain text and rows
page.py       contents → HTML; the library that draws is put into the page
page.html.jinja, page.css, page.js
"""

from prunus.report.page import try_report, write_report

__all__ = ["try_report", "write_report"]
