"""Which table, heat map or sentence shows a result of the microscope?

Each module makes a `Page` of the results of the microscope module of the same name; `answer` shows a prediction. They
import no torch, so that a session starts without it; `render.display` registers them by the results' classes. Read
`answer` first, then `lens` for a heat map and `tree` for a tree.
"""
