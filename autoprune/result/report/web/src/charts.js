// The parts of Apache ECharts that the page uses; everything else is left out of the bundle.
import { BarChart, HeatmapChart, LineChart, ScatterChart } from "echarts/charts";
import { DataZoomInsideComponent, GridComponent, VisualMapContinuousComponent } from "echarts/components";
import { getInstanceByDom, init, use } from "echarts/core";
import { CanvasRenderer } from "echarts/renderers";

use([
  BarChart,
  HeatmapChart,
  LineChart,
  ScatterChart,
  DataZoomInsideComponent,
  GridComponent,
  VisualMapContinuousComponent,
  CanvasRenderer,
]);

export { getInstanceByDom, init };
