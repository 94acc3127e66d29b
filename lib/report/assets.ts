/**
 * The texts that a report page is made of: the chart library uPlot with its licence, and the page's
 * own script and style. Embedded in the binary; nothing here is run by genie itself.
 */
// @ts-expect-error a text, whatever its name
import library from "uplot/dist/uPlot.iife.min.js" with { type: "text" };
// @ts-expect-error a text, whatever its name
import libraryStyle from "uplot/dist/uPlot.min.css" with { type: "text" };
// @ts-expect-error a text, whatever its name
import licence from "uplot/LICENSE" with { type: "text" };
// @ts-expect-error a text, whatever its name
import style from "./page.css" with { type: "text" };
// @ts-expect-error a text, whatever its name
import script from "./page.js" with { type: "text" };

/** What goes into the page, as it is. */
export const assets: Record<"library" | "libraryStyle" | "licence" | "script" | "style", string> = {
  library,
  libraryStyle,
  licence,
  script,
  style,
};
