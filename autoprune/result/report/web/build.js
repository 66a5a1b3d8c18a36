// Builds the scripts and the style of the page into a folder: node build.js FOLDER
import { build } from "esbuild";

const folder = process.argv[2];
const common = { bundle: true, minify: true, target: ["es2022"], charset: "ascii", legalComments: "none", logLevel: "info" };
const licence = "/* Apache ECharts 6 and zrender, own build of the charts used: see NOTICE. */";
await build({
  ...common,
  entryPoints: ["src/charts.js"],
  format: "iife",
  globalName: "charts",
  banner: { js: licence },
  outfile: `${folder}/charts.js`,
});
await build({ ...common, entryPoints: ["src/main.js"], format: "iife", outfile: `${folder}/page.js` });
await build({ ...common, entryPoints: ["src/page.css"], outfile: `${folder}/page.css` });
