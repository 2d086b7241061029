"All figures have one style, which yields to the Matplotlib settings of the user; HTML pages come from one function"
import ast
import jinja2, matplotlib, pytest
from fastai.vision.all import *
from self_supervised.all import *
from helpers import *

root = Path(__file__).resolve().parent.parent/'self_supervised'
NO_STYLE = {'attention_video'}                                   # frames without any text

def settings(): return {k: plt.rcParams[k] for k in figure_rc}

def test_imports_change_no_setting(): assert settings()=={k: matplotlib.rcParamsDefault[k] for k in figure_rc}

def functions(tree):
    "Functions of a module with all that they contain, methods too"
    for o in tree.body:
        if isinstance(o, ast.ClassDef): yield from functions(o)
        if isinstance(o, ast.FunctionDef): yield o

def creates_figure(f): return any(isinstance(o, ast.Attribute) and ast.unparse(o) in ('plt.subplots','plt.figure') for o in ast.walk(f))

def test_functions_that_create_a_figure_use_the_style():
    found = {f.name: any('figure_style' in ast.unparse(d) for d in f.decorator_list) or 'rc_context(_style' in ast.unparse(f)
             for p in sorted(root.rglob('*.py')) for f in functions(ast.parse(p.read_text(encoding='utf-8'))) if creates_figure(f)}
    drawn = {'_curves','_comparison_curves'}                     # by `_light_and_dark`, in the style of the report
    assert len(found)>=12 and {n for n,ok in found.items() if not ok}-drawn==NO_STYLE

@pytest.fixture(scope='module')
def history(): return pd.DataFrame(dict(epoch=[0,1,2], train_loss=[5.,4,3], teacher_entropy=[3.,2.5,2], kl=[2.,1.5,1], knn=[.5,.6,.7], rankme=[20.,21,19]))

def test_style_of_a_figure(history):
    before = settings()
    loss,knn,rankme = plot_history(history, 5.5)
    assert settings()==before
    assert loss.title.get_fontsize()==figure_rc['axes.titlesize'] and not loss.spines.top.get_visible()
    assert [l.get_color() for l in loss.lines[:3]]==list(figure_colors[:3]) and not loss.get_legend().get_frame_on()
    assert loss.get_ylabel()=='nats' and knn.get_ylabel()=='accuracy' and rankme.get_ylim()[0]==0
    legend = loss.get_legend().get_window_extent().transformed(loss.transData.inverted())
    assert legend.y0>5.5                                         # above all curves and the line of ln K
    plt.close('all')

def test_settings_of_the_user_are_kept(history):
    own = {'axes.titlesize':21., 'axes.spines.top':False, 'lines.linewidth':4., 'axes.facecolor':'black', 'font.size':10.}
    with plt.rc_context(own):
        ax = plot_history(history)[0]
        assert ax.title.get_fontsize()==21 and ax.lines[0].get_linewidth()==4 and ax.get_facecolor()==(0,0,0,1)
        assert ax.lines[0].get_color()==figure_colors[0] and plt.rcParams['axes.titlesize']==21
    plt.close('all')

def test_an_error_restores_the_settings():
    before = settings()
    with pytest.raises(ValueError): show_neighbours(torch.rand(3,2), torch.rand(3,3,4,4), [0], k=9)
    assert settings()==before

def test_few_classes_have_distinct_colours():
    f,y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)),torch.arange(40)%10
    ax  = show_tsne(f, y)
    assert len({tuple(c.get_facecolor()[0]) for c in ax.collections})==10 and all(s.get_visible() for s in ax.spines.values())
    plt.close('all')

def test_saved_figures_keep_their_layout(tmp_path, history):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        save_figure(plot_history(history), tmp_path/'a.png')
        save_figure(show_neighbours(torch.rand(3,2), torch.rand(3,3,4,4), [0], k=2), tmp_path/'b.png')
    assert (tmp_path/'a.png').stat().st_size>5000 and not plt.get_fignums()

def test_pages_name_a_missing_value():
    with pytest.raises(jinja2.UndefinedError): render_page('explore.jinja', title='a')
