// A click on a heading sorts each part of the table by that column; rows set apart stay apart.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b);
    for (const body of table.tBodies) {
      const rows = [...body.rows];
      const known = rows.filter(row => value(row) !== undefined);
      known.sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
      body.append(...known, ...rows.filter(row => value(row) === undefined));
    }
  }));
}
