"""Entry of the dashboard: `python -m streamlit run app/main.py` from the root of the checkout."""

from pathlib import Path

import streamlit as st

HERE = Path(__file__).parent
# not a folder "pages": streamlit would run its files by themselves when a fresh server is asked for
# one of them by its address

st.set_page_config(
    page_title="Transformer planner",
    page_icon=str(HERE / "icon.png"),
    layout="wide",
    initial_sidebar_state=340,
)

st.navigation(
    [
        st.Page(HERE / "views" / "plan.py", title="Plan", default=True),
        st.Page(HERE / "views" / "explore.py", title="Explore", url_path="explore"),
        st.Page(HERE / "views" / "check.py", title="Check", url_path="check"),
        st.Page(HERE / "views" / "measured.py", title="Measured", url_path="measured"),
    ],
    position="top",
).run()
